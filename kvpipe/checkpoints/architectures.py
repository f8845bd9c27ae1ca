"""The models of the installed engine, read off its files: the parent must not import it, or jax."""

import importlib.util
import re
from functools import cache
from pathlib import Path

_ENTRY = re.compile(r"^EntryClass\s*=\s*(\w+|\[[^\]]*\])", re.MULTILINE)


@cache
def supported() -> frozenset[str]:
    """Return the architectures that the engine has a class for; empty if that cannot be read."""
    found = importlib.util.find_spec("sgl_jax")
    folders = (found and found.submodule_search_locations) or ()
    return frozenset(
        name
        for folder in folders
        for file in (Path(folder) / "srt/models").glob("*.py")
        for entry in _ENTRY.findall(file.read_text(encoding="utf-8"))
        for name in re.findall(r"\w+", entry)
    )
