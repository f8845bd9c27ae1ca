"""Run the benchmarks: ``make bench``. The last line is one JSON object with every number.

They run on four virtual CPU devices. Numbers of different runs are not comparable on a shared
machine; what is compared is measured in turns within one run.
"""

import importlib
import json
import os
import sys

MODULES = ("weights",)
DEVICES = 4


def main() -> None:
    """Measure what is named on the command line, by default everything."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    measured: dict[str, float] = {}
    for name in sys.argv[1:] or MODULES:
        measured |= importlib.import_module(f"benchmarks.{name}").measure()
    print(json.dumps({key: round(value, 4) for key, value in measured.items()}))


main()
