"""Find failed uploads in the log of W&B's service.

If the server refuses rows or a file, W&B's ``finish`` still returns normally and its service only
writes to its log. So this module reads the log: lost telemetry must be reported.
"""

import json
from pathlib import Path

LOG_FILE = Path("logs") / "debug-internal.log"
# The service's messages once it has stopped retrying; a retried attempt matches none of them.
_GIVEN_UP = ("fatal error", "giving up", "failed to upload", "returned error")


def upload_errors(sync_dir: Path) -> list[str]:
    """Return the uploads that W&B's service gave up in the run of ``sync_dir``, worst first."""
    path = sync_dir / LOG_FILE
    if not path.exists():
        # W&B need not write a log: without one, assume that nothing was lost.
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    # "ERROR+4" is the service's fatal level; it sorts first.
    entries.sort(key=lambda entry: entry["level"], reverse=True)
    return [
        entry["msg"]
        for entry in entries
        if entry["level"].startswith("ERROR") and any(sign in entry["msg"] for sign in _GIVEN_UP)
    ]
