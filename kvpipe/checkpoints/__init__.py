"""Weights on the host: files, parameter trees and the generated tiny model; never on a device."""

# Here, because a check of the config imports no numpy: the name of a checkpoint's index, and the dtypes
# that weights on the host may have.
INDEX_NAME = "model.safetensors.index.json"
HOST_DTYPES = ("bfloat16", "float16", "float32")
