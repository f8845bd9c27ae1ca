"""Read a parameter tree saved by orbax into host memory only.

Orbax imports jax, so import it only when reading a tree: the parent process must not load jax.
"""

from pathlib import Path
from typing import Any

import numpy as np

from kvpipe.errors import InputError


def read_tree(directory: Path) -> dict[str, Any]:
    """Return the tree in ``directory`` with numpy arrays as leaves, each in its saved dtype.

    Raises:
        InputError: the directory has no orbax checkpoint.
    """
    from orbax import checkpoint

    if not (directory / "_METADATA").is_file():
        raise InputError(f"{directory} is not an orbax checkpoint: it has no file _METADATA")
    reader = checkpoint.PyTreeCheckpointer()
    saved: Any = reader.metadata(directory.resolve()).item_metadata
    # Without this orbax would put the leaves on the devices they were saved from.
    on_host = checkpoint.RestoreArgs(restore_type=np.ndarray)
    return reader.restore(directory.resolve(), restore_args=_for_each(saved.tree, on_host))


def _for_each(tree: Any, leaf: Any) -> Any:
    """Return the nested dictionaries of ``tree`` with every leaf replaced by ``leaf``."""
    if not isinstance(tree, dict):
        return leaf
    return {key: _for_each(node, leaf) for key, node in tree.items()}
