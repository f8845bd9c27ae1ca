"""Paths of the phases and configs that ship with kvpipe.

In the repository ``phases/`` and ``conf/`` lie beside the package, in a wheel inside it, as
``_phases`` and ``_conf`` (pyproject.toml). They are found from the package's own place, never by an
importable name: the working directory or another package may have that name too.
"""

from pathlib import Path


def place_of(folder: str, package: Path) -> Path:
    """Return the place of ``conf`` or ``phases`` for a copy of the package ``kvpipe``."""
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder


# Not resolved: a package that is a symbolic link has its phases beside the link.
PACKAGE = Path(__file__).parents[1]
CONF = place_of("conf", PACKAGE)
PHASES = place_of("phases", PACKAGE)
