"""The worker's part of a run: plan, run the worker steps, report to the parent.

:mod:`kvpipe.worker.entry` is the process that it usually runs in. Only :func:`with_engine`
imports jax and the engine.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.model_dir import cache_dir
from kvpipe.checkpoints.resumable import check_devices
from kvpipe.config import examples
from kvpipe.config.prompt import read_prompt
from kvpipe.config.schema import Kvpipe, from_plain
from kvpipe.engine import multihost
from kvpipe.errors import Ending, EngineError, InputError, ending_of
from kvpipe.pipeline import rewards
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import SAVED, base_name
from kvpipe.pipeline.phase import Phase, WorkerPhase
from kvpipe.pipeline.steps import origins, step_names, use_of
from kvpipe.plan.continuation import planned_steps
from kvpipe.plan.fit import why_not_fit
from kvpipe.plan.fold import Plan, PlannedStep
from kvpipe.plan.inputs import check_inputs
from kvpipe.records.run import PhaseRecord, PlannedPhase, RunPlanned
from kvpipe.system.pipes import send, send_line
from kvpipe.system.versions import installed_versions
from kvpipe.worker import loop
from kvpipe.worker.orders import Orders

Planner = Callable[[Sequence[PlannedStep], Kvpipe, Path], Plan]
Load = Callable[[Kvpipe], Planner]


def with_engine(config: Kvpipe) -> Planner:
    """Import jax and the engine, which takes seconds; return the planner."""
    from kvpipe.engine import compat, compile_cache
    from kvpipe.worker import planner

    compile_cache.keep_in(cache_dir(config) / "compiled", config.runner.compile_cache_bytes)
    compat.import_engine()
    return planner.plan_here


def execute(
    config: Kvpipe,
    callbacks: loop.Callbacks,
    run_began: float,
    may_begin: Callable[[], object] = lambda: None,
    load: Load = with_engine,
) -> Ending:
    """Run the worker's steps in this process, and shut the engine down at the end.

    ``load`` imports the engine or its replacement and returns the planner; that happens at once,
    but no step starts before ``may_begin`` returns: then the parent's own steps are done.
    """
    ctx = WorkerContext(config, read_prompt(config.prompt))
    try:
        planner = load(config)
        may_begin()
        callbacks.joined(multihost.join(config.engine, _common(ctx)))
        jobs = _planned_jobs(ctx, callbacks, run_began, planner)
        ending = loop.run(jobs, ctx, callbacks, run_began)
    except Exception as error:
        traceback.print_exc()
        ending = ending_of(error)
    ending = _shut_down(ctx, ending)
    multihost.leave()
    return ending


def _common(ctx: WorkerContext) -> dict[str, Any]:
    """Return the values that must be the same on all hosts, by config key.

    The rank and the download directory may differ.
    """
    config = ctx.config
    own = {"node_rank": None, "download_dir": None}
    return {
        "pipeline": list(config.pipeline),
        "phases": config.phases,
        "repeat": config.repeat and asdict(config.repeat),
        "engine": asdict(config.engine) | own,
        "trainer": asdict(config.trainer),
        "trainer.data": examples.digest(config.trainer),
        "prompt": ctx.prompt,
        "prompts": [asdict(prompt) for prompt in ctx.prompts],
        "sampling": asdict(config.sampling),
        "runner.on_error": config.runner.on_error,
        "plan.enforce": config.plan.enforce,
        "versions": installed_versions(),
        # The directories may have other names there.
        "the code of phases": {use: origin.sha256 for use, origin in origins(config).items()},
        "the code of the reward": [origin.sha256 for origin in rewards.origins(config).values()],
    }


def work(
    plain: Mapping[str, Any],
    run_began: float,
    descriptor: int,
    orders: Orders,
    load: Load = with_engine,
) -> int:
    """Do the job and report on a descriptor; return the exit code.

    Args:
        plain: the config to run, as plain values.
        run_began: ``time.monotonic()`` when the run began.
        descriptor: receives starts, records and the ending, one JSON line each.
        orders: the parent's orders, which arrive on another thread.
        load: imports the engine or its replacement; returns the planner.
    """
    whole_lines = threading.Lock()  # progress is reported from another thread
    after_save = False

    def report(message: Mapping[str, Any]) -> None:
        with whole_lines:
            send(channel, message)

    def start(step: str, idx: int) -> None:
        nonlocal after_save
        orders.catch_up()
        saves = base_name(step) == SAVED
        if orders.stopped and not saves:
            report({"stopped": step})
            raise loop.StopAsked
        # Whatever ends the run inside the step, the parent's last record names this step.
        report({"started": step, "idx": idx})
        orders.began()
        if saves or after_save:  # a resumed run repeats no step that is saved, and not the save
            orders.catch_up(unknown=0)
        after_save = saves

    def record(made: RunPlanned | PhaseRecord) -> None:
        with whole_lines:
            send_line(channel, made.line)

    with os.fdopen(descriptor, "w", encoding="utf-8") as channel:
        callbacks = loop.Callbacks(
            joined=lambda hosts: report({"hosts": list(hosts)}),
            planned=record,
            started=start,
            progressed=lambda progress: report({"progress": asdict(progress)}),
            sampled=lambda step, sample: report({"sample": sample, "of": step}),
            finished=record,
        )
        ending = execute(from_plain(dict(plain)), callbacks, run_began, orders.wait, load)
        # Once the parent has the ending it waits for nothing more.
        sys.stdout.flush()
        sys.stderr.flush()
        send(channel, asdict(ending))
    return ending.exit_code


def _planned_jobs(
    ctx: WorkerContext, callbacks: loop.Callbacks, run_began: float, planner: Planner
) -> Sequence[loop.Job]:
    """Plan the run, report the plan, and return the worker's steps with their planned ledgers."""
    config = ctx.config
    planned = planned_steps(config)

    def make() -> Plan:
        check_inputs(config, planned, ctx.model_dir)
        plan = planner(planned, config, ctx.model_dir)
        callbacks.planned(replace(plan.record, elapsed_s=round(time.monotonic() - run_began, 6)))
        check_devices(config, plan.record.devices)
        if config.plan.enforce and (why := why_not_fit(plan.record)):
            raise InputError(f"{why} (plan.enforce=false runs it anyway)")
        return plan

    plan = multihost.in_stage(make)
    ctx.planned_temporaries = {each.name: each.temp_bytes for each in plan.record.programs}
    places = {name: idx for idx, name in enumerate(step_names(config))}
    return [
        loop.Job(
            places[item.step.step],
            use_of(item.step.step, config),
            item.step,
            ledger,
            checked_peak(item.step, phase),
        )
        for item, ledger, phase in zip(plan.steps, plan.ledgers, plan.record.phases, strict=True)
        if isinstance(item.step, WorkerPhase)
    ]


def checked_peak(step: Phase, planned: PlannedPhase) -> int:
    """Return the most bytes that a step may hold on a device; 0 if that is not checked."""
    return planned.peak_device_bytes if step.peak_is_checked else 0


def _shut_down(ctx: WorkerContext, ending: Ending) -> Ending:
    """Shut the engine down; an error here counts only if nothing failed before."""
    if ctx.started is None:
        return ending
    from kvpipe.engine import memory

    engine, ctx.started = ctx.started, None
    ctx.slots.clear()
    ctx.made_trainer = None
    ctx.owners = None
    try:
        engine.shut_down()
    except Exception as error:
        traceback.print_exc()
        if ending == Ending():
            message = f"the engine did not shut down: {type(error).__name__}: {error}"
            return ending_of(EngineError(message))
    memory.collect_garbage()
    return ending
