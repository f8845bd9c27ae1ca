"""``kvpipe check``: refuse wrong input and a wrong order of the steps, with nothing loaded."""

from omegaconf import DictConfig

from kvpipe.cli.common import checked_steps, completed_elsewhere, notify
from kvpipe.config.schema import from_plain, to_plain
from kvpipe.errors import HELD
from kvpipe.parent.resumption import messages
from kvpipe.units import counted


def act(composed: DictConfig) -> int:
    """Check the order of the steps by folding their declared effects, and print the result."""
    config = from_plain(completed_elsewhere(to_plain(composed)))
    steps = checked_steps(config)
    for line in messages(config, steps):
        notify(f"kvpipe: {line}\n")
    print(f"{config.experiment}: {counted(len(steps), 'step')}, their order holds")
    return HELD
