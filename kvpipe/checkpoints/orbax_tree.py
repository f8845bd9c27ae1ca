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
    import jax
    from orbax import checkpoint

    if not (directory / "_METADATA").is_file():
        raise InputError(f"{directory} is no orbax checkpoint: it has no file _METADATA")
    reader = checkpoint.PyTreeCheckpointer()
    saved = reader.metadata(directory.resolve()).item_metadata.tree
    # Without this orbax would put the leaves on the devices that they were saved from.
    on_host = checkpoint.RestoreArgs(restore_type=np.ndarray)
    return reader.restore(directory.resolve(), restore_args=jax.tree.map(lambda _: on_host, saved))
