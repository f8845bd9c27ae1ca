"""Run the benchmarks: ``make bench``. The last line is one JSON object with every number.

Numbers of different runs are not comparable on a shared machine, so alternatives are measured in
turns within one run.
"""

import importlib
import json
import sys

from benchmarks.devices import use_virtual_devices

MODULES = (
    "weights",
    "kv",
    "rollout",
    "attached",
    "start",
    "gaps",
    "plan",
    "supervision",
    "command_line",
)


def main() -> None:
    """Run the benchmarks named on the command line, by default all."""
    use_virtual_devices()
    measured: dict[str, float] = {}
    for name in sys.argv[1:] or MODULES:
        measured |= importlib.import_module(f"benchmarks.{name}").measure()
    print(json.dumps({key: round(value, 4) for key, value in measured.items()}))


main()
