"""Weights on the host: files, parameter trees and the generated tiny model; never on a device."""

# Dtypes that a host tree can be cast to. Here, because a check of the config imports no numpy.
HOST_DTYPES = ("bfloat16", "float16", "float32")
