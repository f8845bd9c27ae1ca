"""The doctor's questions to jax and the engine, asked in a separate child process."""

import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpipe.config.schema import from_plain
from kvpipe.engine import compat, devices
from kvpipe.errors import KvpipeError, ending_of
from kvpipe.plan import fit
from kvpipe.plan.continuation import planned_steps
from kvpipe.system.pipes import send
from kvpipe.worker import planner


def main() -> None:
    """Entry point of ``python -m kvpipe.worker.doctor_probe FD``: one job on stdin, one answer on FD."""
    job = json.loads(sys.stdin.readline())
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as channel:
        send(channel, _answer(job))
    # Python's normal exit can hang in the threads of the TPU's runtime.
    os._exit(0)


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    config = from_plain(job["config"])
    try:
        devices.check_devices(config.engine)
        found = {
            "devices": devices.describe(),
            "hbm_bytes": devices.memory_bytes(),
            "patches": compat.in_force(),
            "why_not_fit": None,
            "peak_bytes": None,
            "warning": None,
        }
        if job["model_dir"] is None:
            return found
        record = planner.plan_here(planned_steps(config), config, Path(job["model_dir"])).record
    except Exception as error:
        if not isinstance(error, KvpipeError):
            traceback.print_exc()
        return asdict(ending_of(error))
    peak = max(phase.most_device_bytes for phase in record.phases)
    return found | {
        "why_not_fit": fit.why_not_fit(record),
        "peak_bytes": peak,
        "warning": record.warning,
    }


if __name__ == "__main__":
    main()
