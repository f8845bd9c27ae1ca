"""``kvpipe compare-plans``: the cost in bytes of a change of code or config."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kvpipe.config.schema import from_plain, to_plain
from kvpipe.errors import HELD, KvpipeError
from kvpipe.parent import revisions
from kvpipe.parent.planner_client import plan_limit
from kvpipe.report.comparison_report import plans_as_markdown
from kvpipe.sweeps.jobs import config_dir
from kvpipe.system.alarm import limited


def act(composed: DictConfig) -> int:
    """Print the cost in bytes of changed files or overrides, experiment by experiment.

    Raises:
        KvpipeError: the cost exceeds the budget.
        TimedOut: git took longer than ``plan.timeout_s``.
    """
    config = from_plain(to_plain(composed))
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices.get("experiment")
    with tempfile.TemporaryDirectory(prefix="kvpipe-compare-") as scratch:
        with limited(*plan_limit(config.plan, "git")):
            before, after = revisions.sides(
                config.compare_plans,
                _common_overrides(hydra_config.overrides.task),
                config_dir(hydra_config.runtime.config_sources),
                Path(scratch),
            )
        changes = revisions.changes(before, after, [chosen] if chosen else None)
    print(plans_as_markdown(changes, before.name, after.name), end="")
    if beyond := [why for c in changes if (why := c.excess(config.compare_plans.budget_bytes))]:
        raise KvpipeError("; ".join(beyond))
    return HELD


def _common_overrides(overrides: Sequence[str]) -> list[str]:
    own = ("compare_plans.", "experiment=")
    return [text for text in overrides if not text.lstrip("+~").startswith(own)]
