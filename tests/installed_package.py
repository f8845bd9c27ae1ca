"""A package of a user's that is installed beside kvpipe, with entry points."""

from collections.abc import Mapping
from pathlib import Path

VERSION = "2.1"


def install(site: Path, name: str, files: Mapping[str, str], **points: Mapping[str, str]) -> None:
    """Write a distribution's files and its entry points into ``site``, as pip does.

    Args:
        site: a folder of ``sys.path``.
        name: the distribution's name.
        files: path below ``site`` → content.
        points: ``phases``, ``sinks`` or ``rewards`` → name → ``module:object``.
    """
    info = site / f"{name.replace('-', '_')}-{VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n")
    lines = [
        f"[kvpipe.{group}]\n" + "".join(f"{key} = {value}\n" for key, value in given.items())
        for group, given in points.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    for path, content in files.items():
        file = site / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
