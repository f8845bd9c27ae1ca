"""The parent's side of planning without a run: a child process evaluates the engine's shapes.

The plan of an unchanged config is on disk (:mod:`kvpipe.parent.plan_cache`). Keep the child for the next job of a sweep: it spends nearly all of its time on imports.
"""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from kvpipe.checkpoints.model_dir import shape_dir
from kvpipe.config.jax_environment import cpu_environment
from kvpipe.config.schema import Kvpipe, PlanConfig
from kvpipe.errors import EngineError, InputError, KvpipeError, OutOfMemory, TimedOut
from kvpipe.parent import plan_cache
from kvpipe.parent.child_process import Child, start_child
from kvpipe.plan.targets import Target
from kvpipe.records.run import RunPlanned
from kvpipe.system.alarm import limited
from kvpipe.system.secrets import without_key

_SHUTDOWN_TIMEOUT_S = 10.0
_ERRORS = {error.exit_code: error for error in (KvpipeError, InputError, EngineError, OutOfMemory)}


class Planners:
    """The planning child processes, one per number of devices, started on demand."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._children: dict[int, Child] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the children."""
        self._children.clear()
        self._stack.close()
        self.__dict__.pop("_scratch", None)

    def plan(self, config: Kvpipe, plain: dict[str, Any], target: Target) -> RunPlanned:
        """Return the plan for a target of a config, typed and plain, that has passed every check.

        Only a plan that no earlier call has made starts a child.

        Raises:
            InputError: the engine refuses the model, the mesh or the capacity.
            EngineError: its shapes cannot be evaluated for another reason, or the child died.
            OutOfMemory: the host has no memory left for that.
            TimedOut: it took longer than ``plan.timeout_s``.
        """
        model_dir = shape_dir(config, self._scratch)
        make = partial(self._ask, config, plain, target, model_dir)
        return plan_cache.kept(config, plain, target, model_dir, make)

    def _ask(
        self, config: Kvpipe, plain: dict[str, Any], target: Target, model_dir: Path
    ) -> RunPlanned:
        child = self._child(target.devices)
        job = {"config": plain, "target": asdict(target), "model_dir": str(model_dir)}
        try:
            with limited(*plan_limit(config.plan, "the plan")):
                child.send(job)
                answer = next(child.messages(), None)
        except TimedOut:
            # Its answer, if it came, would be taken for that of the next job.
            self._children.pop(target.devices).kill()
            raise
        if answer is None:
            raise EngineError(
                f"the planning process ended by {child.how_it_ended()}; its log ended with:\n"
                f"{child.log_tail()}"
            )
        if "error" in answer:
            raise _ERRORS[answer["exit_code"]](answer["error"])
        return RunPlanned.from_json(answer["plan"])

    @cached_property
    def _scratch(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvpipe-plan-")))

    def _child(self, devices: int) -> Child:
        if devices not in self._children:
            environ = without_key(os.environ) | cpu_environment(devices, os.environ)
            environ["HF_HUB_OFFLINE"] = "1"
            log = self._scratch / f"planner-{devices}.log"
            started = start_child("kvpipe.worker.planner", log, environ, _SHUTDOWN_TIMEOUT_S)
            self._children[devices] = self._stack.enter_context(started)
        return self._children[devices]


def plan_limit(config: PlanConfig, what: str) -> tuple[float | None, str]:
    """Return ``plan.timeout_s`` and the error message about ``what`` after it."""
    return config.timeout_s, f"{what} took longer than plan.timeout_s = {config.timeout_s or 0:g} s"
