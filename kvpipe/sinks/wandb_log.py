"""Finds in the log of W&B's service what it did not manage to upload.

When the server refuses rows or a file, W&B's ``finish`` still returns as if all were well; its
service only writes to its log. So the log is read: lost telemetry has to be loud.
"""

import json
from pathlib import Path

LOG_FILE = Path("logs") / "debug-internal.log"
# What the service says once it has stopped trying; an attempt that it repeats is none of these.
_GIVEN_UP = ("fatal error", "giving up", "failed to upload", "returned error")


def upload_errors(sync_dir: Path) -> list[str]:
    """Return what W&B's service gave up, the gravest first, for the run kept in ``sync_dir``."""
    path = sync_dir / LOG_FILE
    if not path.exists():
        # The log is W&B's own affair: without one there is nothing to say against the run.
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    # "ERROR+4" is what the service calls fatal; it comes first.
    entries.sort(key=lambda entry: entry["level"], reverse=True)
    return [
        entry["msg"]
        for entry in entries
        if entry["level"].startswith("ERROR") and any(sign in entry["msg"] for sign in _GIVEN_UP)
    ]
