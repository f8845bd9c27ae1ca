"""The child process: it holds jax and the engine, runs the worker's steps, streams what happens."""

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpipe import planner, runner
from kvpipe.child import send
from kvpipe.context import WorkerContext
from kvpipe.errors import UNEXPECTED_EXIT_CODE, KvpipeError
from kvpipe.phase import WorkerPhase
from kvpipe.prompt import read_prompt
from kvpipe.schema import Kvpipe, from_plain
from kvpipe.steps import build_steps, use_of


@dataclass(frozen=True)
class Outcome:
    """How the worker's part ended.

    Attributes:
        exit_code: 0, or that of the error.
        error: why it failed, in one message; None if it did not.
    """

    exit_code: int
    error: str | None = None


def execute(config: Kvpipe, events: runner.Events, run_began: float) -> Outcome:
    """Run the worker's steps in this process; the engine is shut down at the end.

    Args:
        config: the config that runs.
        events: where starts and records go.
        run_began: ``time.time()`` when the run began.
    """
    ctx = WorkerContext(config, read_prompt(config.prompt))
    try:
        runner.run(_planned_jobs(ctx, events, run_began), ctx, events, run_began)
        outcome = Outcome(0)
    except KvpipeError as error:
        traceback.print_exc()
        outcome = Outcome(error.exit_code, str(error))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(UNEXPECTED_EXIT_CODE, f"{type(error).__name__}: {error}")
    return _shut_down(ctx, outcome)


def main() -> None:
    """Entry of ``python -m kvpipe.worker FD``: run the job on stdin, report on descriptor FD."""
    job = json.load(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as channel:
        whole_lines = threading.Lock()  # progress is told from a thread of its own

        def tell(message: Mapping[str, Any]) -> None:
            with whole_lines:
                send(channel, message)

        events = runner.Events(
            planned=lambda plan: tell({"plan": plan.to_json()}),
            started=lambda step, idx: tell({"started": step, "idx": idx}),
            progressed=lambda progress: tell({"progress": progress.to_json()}),
            finished=lambda record: tell({"record": record.to_json()}),
        )
        outcome = execute(from_plain(job["config"]), events, job["run_began"])
        send(channel, {"exit_code": outcome.exit_code, "error": outcome.error})
    sys.stdout.flush()
    sys.stderr.flush()
    # The engine's threads are daemons deep in C++; Python's own way out can crash in them.
    os._exit(outcome.exit_code)


def _planned_jobs(
    ctx: WorkerContext, events: runner.Events, run_began: float
) -> Sequence[runner.Job]:
    """Plan the run, tell the plan, and return the worker's steps with what each has to leave.

    Raises:
        InputError: the plan does not fit the devices, and ``plan.enforce`` is set.
    """
    config = ctx.config
    steps = build_steps(config)
    plan = planner.plan_here(steps, config, ctx.model_dir)
    events.planned(replace(plan.record, elapsed_s=round(time.time() - run_began, 6)))
    if config.plan.enforce:
        planner.refuse_misfit(plan.record)
    return [
        runner.Job(idx, use_of(step.step, config), step, ledger)
        for idx, (step, ledger) in enumerate(zip(steps, plan.ledgers, strict=True))
        if isinstance(step, WorkerPhase)
    ]


def _shut_down(ctx: WorkerContext, outcome: Outcome) -> Outcome:
    """Shut the engine down; a failure of that counts only if nothing failed before it."""
    if ctx.started is None:
        return outcome
    engine, ctx.started = ctx.started, None
    ctx.slots.clear()
    ctx.trainer = None
    try:
        engine.shut_down()
    except Exception as error:
        traceback.print_exc()
        if outcome.exit_code == 0:
            return Outcome(3, f"the engine did not shut down: {type(error).__name__}: {error}")
    gc.collect()
    return outcome


if __name__ == "__main__":
    main()
