"""Read a parameter tree that orbax has saved, onto the host alone.

Orbax brings jax along, so it is imported only when a tree is read: the parent process has no jax.
"""

from pathlib import Path
from typing import Any

import numpy as np

from kvpipe.errors import InputError


def read_tree(directory: Path) -> dict[str, Any]:
    """Return the tree in ``directory`` with numpy arrays for leaves, each in its saved dtype.

    Raises:
        InputError: there is no orbax checkpoint.
    """
    from orbax import checkpoint

    if not (directory / "_METADATA").is_file():
        raise InputError(f"{directory} is no orbax checkpoint: it has no file _METADATA")
    reader = checkpoint.PyTreeCheckpointer()
    saved: Any = reader.metadata(directory.resolve()).item_metadata
    # Without this orbax would put the leaves on the devices that they were saved from.
    on_host = checkpoint.RestoreArgs(restore_type=np.ndarray)
    return reader.restore(directory.resolve(), restore_args=_for_each(saved.tree, on_host))


def _for_each(tree: Any, leaf: Any) -> Any:
    """Return the nested dictionaries of ``tree`` with ``leaf`` in place of each leaf."""
    if not isinstance(tree, dict):
        return leaf
    return {key: _for_each(node, leaf) for key, node in tree.items()}
