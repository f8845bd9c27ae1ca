"""``kvpipe doctor``: the state of this machine."""

import os

from omegaconf import DictConfig

from kvpipe.cli.common import ordered_steps
from kvpipe.config.schema import from_plain, to_plain
from kvpipe.errors import CHECK_FAILED, HELD
from kvpipe.parent import doctor
from kvpipe.sinks.wandb import find_server
from kvpipe.system.secrets import redactor


def act(composed: DictConfig) -> int:
    """Print the state of this machine; return 1 if the experiment could not run on it."""
    plain = to_plain(composed)
    config = from_plain(plain)
    planned = ordered_steps(config)
    could_run = True
    for finding in doctor.examine(config, plain, planned, find_server):
        print(redactor(os.environ, None).text(str(finding)), flush=True)
        could_run &= finding.level is not doctor.Level.BAD
    print(f"{config.experiment} {'could' if could_run else 'could not'} run here")
    return HELD if could_run else CHECK_FAILED
