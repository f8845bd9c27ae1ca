"""Plan with the sizes of the installed engine. It needs jax, so it runs in a child process.

The fold itself is in :mod:`kvpipe.plan`, which needs no jax; :mod:`kvpipe.planning` is the parent's
side.
"""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpipe import plan
from kvpipe.child import send
from kvpipe.engine import devices, shapes
from kvpipe.errors import EngineError, InputError, KvpipeError
from kvpipe.ledger import Ledger
from kvpipe.model_dir import cache_dir
from kvpipe.phase import Phase, Size
from kvpipe.records import Program, RunPlanned
from kvpipe.schema import EngineConfig, Kvpipe, from_plain
from kvpipe.steps import build_steps
from kvpipe.targets import CPU, Target


@dataclass(frozen=True)
class Plan:
    """A plan for the devices that jax has.

    Attributes:
        record: the plan as a record.
        ledgers: the exact ledger after each step, per device.
    """

    record: RunPlanned
    ledgers: tuple[Ledger, ...]


def plan_here(steps: Sequence[Phase], config: EngineConfig, model_dir: Path) -> Plan:
    """Plan the steps for this machine's devices.

    Args:
        steps: all steps of the pipeline, in order.
        config: how the engine will be started.
        model_dir: directory with the model's config.json.
    """
    devices.check_devices(config)
    count = devices.describe()["device_count"]
    target = Target(config.device, count, devices.memory_bytes())
    return plan_for(target, steps, config, model_dir)


def plan_for(
    target: Target,
    steps: Sequence[Phase],
    config: EngineConfig,
    model_dir: Path,
    programs: Sequence[Program] = (),
) -> Plan:
    """Plan the steps for a target; this process has as many devices, of whatever kind.

    Args:
        target: the machine that the plan is for.
        steps: all steps of the pipeline, in order.
        config: how the engine will be started, with the device that this process has.
        model_dir: directory with the model's config.json.
        programs: the engine's steps, compiled for the target; without them the pool ``program`` is
            not planned.
    """
    planned = plan.check_order(steps)
    sizes = shapes.sizes(config, model_dir, plan.kv_capacities(planned))
    code = sum(program.code_bytes for program in programs)
    sizes[Size.PROGRAM] = (code,) * target.devices
    # While a step runs its temporaries are there too; between the phases they are not.
    room = target.hbm_bytes - max((program.temp_bytes for program in programs), default=0)
    ledgers = plan.plan_ledgers(planned, sizes, target.devices)
    # On the CPU each virtual device's engine sees the whole host, with all devices' parameters.
    sees, params = (
        (target.hbm_bytes * target.devices, sum(sizes[Size.PARAMS]))
        if target.name == CPU
        else (target.hbm_bytes, max(sizes[Size.PARAMS]))
    )
    capacity = plan.KvCapacity(
        device_bytes=sizes[Size.KV][0],
        tokens=config.max_total_tokens // config.page_size * config.page_size,
        page_size=config.page_size,
        engine_bytes=plan.engine_kv_bytes(sees, params, config.mem_fraction_static),
    )
    record = RunPlanned(
        target=target.name,
        devices=target.devices,
        sglang_jax=devices.describe()["sgl_jax_version"],
        phases=plan.planned_phases(planned, ledgers),
        fit=replace(
            plan.judge(planned, ledgers, room, capacity),
            hbm_bytes=target.hbm_bytes,
        ),
        programs=programs,
    )
    return Plan(record, ledgers)


def refuse_misfit(planned: RunPlanned) -> None:
    """Refuse a plan that does not fit.

    Raises:
        InputError: with the peak, what a device has, and the largest capacity that would fit.
    """
    if why := plan.misfit(planned):
        raise InputError(f"{why} (plan.enforce=false runs it all the same)")


def main() -> None:
    """Entry of ``python -m kvpipe.planner FD``: plan each job on stdin, report on descriptor FD."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as channel:
        for line in sys.stdin:
            send(channel, _answer(json.loads(line)))


def _programs(job: Mapping[str, Any], config: Kvpipe, target: Target) -> tuple[Program, ...]:
    """Return the engine's compiled steps if the job asks for them.

    Raises:
        CompileFinding: a step does not compile for the target.
    """
    if not config.plan.compile:
        return ()
    from kvpipe.engine import program_cache

    engine = replace(config.engine, device=CPU)
    return program_cache.compiled(
        engine, Path(job["model_dir"]), target.name, job["prompt_tokens"], cache_dir(config)
    )


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of a job, or the message of what went wrong with its exit code."""
    config = from_plain(job["config"])
    engine = replace(config.engine, device=CPU)  # the target's devices are virtual ones here
    try:
        steps = build_steps(config)
        target, model_dir = Target(**job["target"]), Path(job["model_dir"])
        record = plan_for(target, steps, engine, model_dir, _programs(job, config, target)).record
    except KvpipeError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        told = f"the engine refuses this model or mesh: {type(error).__name__}: {error}"
        return {"error": told, "exit_code": EngineError.exit_code}
    return {"plan": record.to_json()}


if __name__ == "__main__":
    main()
