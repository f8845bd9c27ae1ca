"""Weights on the host: files, parameter trees and the generated tiny model; never a device."""

# What the leaves of a host tree can be cast to. Here, because a check of the config has no numpy.
HOST_DTYPES = ("bfloat16", "float16", "float32")
