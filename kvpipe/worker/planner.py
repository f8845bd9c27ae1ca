"""Plan with the sizes of the installed engine; needs jax, so it runs in a child process.

:mod:`kvpipe.plan.fold` has the fold over the effects, without jax; :mod:`kvpipe.parent.planner_client` is the
parent's side.
"""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.model_check import check_config
from kvpipe.checkpoints.model_dir import cache_dir
from kvpipe.config.schema import EngineConfig, Kvpipe, from_plain
from kvpipe.engine import devices, shapes, training
from kvpipe.errors import EngineError, KvpipeError, ending_of
from kvpipe.pipeline.ledger import TRAINER_PROGRAMS, TRAINER_SETS, PerDevice, PoolSize, Size
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan import fit, fold
from kvpipe.plan.inputs import check_split
from kvpipe.plan.pages import whole_pages
from kvpipe.plan.targets import CPU, Target
from kvpipe.records.run import Program, RunPlanned
from kvpipe.system.pipes import send
from kvpipe.trainer.layout import lay_out


def plan_here(planned: Sequence[fold.PlannedStep], config: Kvpipe, model_dir: Path) -> fold.Plan:
    """Plan all steps of a pipeline for this machine's devices."""
    devices.check_devices(config.engine)
    count = devices.describe()["device_count"]
    target = Target(config.engine.device, count, devices.memory_bytes())
    _check_model(config.engine, model_dir, count)
    return plan_for(target, planned, config, model_dir)


def plan_for(
    target: Target,
    planned: Sequence[fold.PlannedStep],
    config: Kvpipe,
    model_dir: Path,
    programs: Sequence[Program] = (),
) -> fold.Plan:
    """Plan all steps of a pipeline for a target; this process must have as many devices.

    They may be of any kind. Without ``programs``, the steps of the engine and the trainer compiled
    for the target, the pools ``program`` and ``program:trainer`` are not planned.
    """
    engine = config.engine
    found = shapes.of_devices_here(engine, model_dir)
    sizes = found.sizes(fold.kv_capacities(planned)) | _code_sizes(programs, target.devices)
    if trains(planned):
        tree = training.source_shapes(found.sources, found.params)
        sizes |= lay_out(tree, found.mesh, config.trainer).sizes
    ledgers = fold.plan_ledgers(planned, sizes, target.devices)
    # On the CPU each virtual device's engine sees the whole host and all of the host's parameters.
    on_host = target.devices // engine.nnodes
    sees, params = (
        (target.hbm_bytes * on_host, sum(sizes[Size.PARAMS][:on_host]))
        if target.name == CPU
        else (target.hbm_bytes, max(sizes[Size.PARAMS]))
    )
    capacity = fit.KvCapacity(
        device_bytes=sizes[Size.KV][0],
        tokens=whole_pages(engine.max_total_tokens, engine.page_size),
        page_size=engine.page_size,
        engine_bytes=fit.engine_kv_bytes(sees, params, engine.mem_fraction_static),
    )
    temporaries = [fit.temporaries(item.effect, programs) for item in planned]
    record = RunPlanned(
        target=target.name,
        devices=target.devices,
        sglang_jax=devices.describe()["sgl_jax_version"],
        phases=fold.planned_phases(planned, ledgers),
        fit=fit.fit_of(planned, ledgers, target.hbm_bytes, capacity, temporaries),
        programs=programs,
    )
    return fold.Plan(replace(record, warning=fit.warning(record)), ledgers)


def _check_model(engine: EngineConfig, model_dir: Path, devices: int) -> None:
    """Refuse a config.json that is not right, or devices over which the model cannot be divided.

    The doctor and a plan come here without the check of the inputs that a run makes; and only here
    the number of devices is known for certain.
    """
    file = model_dir / "config.json"
    check_split(engine, check_config("model", file, str(file)), devices)


def trains(planned: Sequence[fold.PlannedStep]) -> bool:
    """Whether a step needs the sizes of a trainer."""
    return any(size in TRAINER_SETS for item in planned for size in item.pools.values())


def _code_sizes(programs: Sequence[Program], count: int) -> dict[PoolSize, PerDevice]:
    """Return the bytes of compiled code on each of ``count`` devices: the engine's, the trainer's."""
    code: dict[PoolSize, int] = {Size.PROGRAM: 0, Size.TRAINER_PROGRAM: 0}
    for program in programs:
        owner = Size.TRAINER_PROGRAM if program.name in TRAINER_PROGRAMS else Size.PROGRAM
        code[owner] += program.code_bytes
    return {size: (held,) * count for size, held in code.items()}


def main() -> None:
    """Entry point of ``python -m kvpipe.worker.planner FD``: plan each job on stdin, report on FD."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as channel:
        for line in sys.stdin:
            send(channel, _answer(json.loads(line)))


def _programs(
    job: Mapping[str, Any], planned: Sequence[fold.PlannedStep], config: Kvpipe, target: Target
) -> tuple[Program, ...]:
    """Return the compiled steps of the engine and of a trainer, if the job asks for them."""
    if not config.plan.compile:
        return ()
    from kvpipe.engine import program_cache
    from kvpipe.trainer import aot

    model_dir, cache = Path(job["model_dir"]), cache_dir(config)
    programs = program_cache.compiled(
        config.engine, model_dir, target.name, job["prompt_tokens"], cache
    )
    if trains(planned):
        programs += aot.compiled(config.engine, config.trainer, model_dir, target.name, cache)
    return programs


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of a job, or the ending by an error."""
    config = from_plain(job["config"])
    # Here the target's devices are virtual CPU devices.
    config = replace(config, engine=replace(config.engine, device=CPU))
    try:
        planned = fold.check_order(build_steps(config))
        target, model_dir = Target(**job["target"]), Path(job["model_dir"])
        _check_model(config.engine, model_dir, target.devices)
        programs = _programs(job, planned, config, target)
        record = plan_for(target, planned, config, model_dir, programs).record
    except KvpipeError as error:
        return asdict(ending_of(error))
    except Exception as error:
        traceback.print_exc()
        message = f"the engine's shapes cannot be evaluated: {type(error).__name__}: {error}"
        return asdict(ending_of(EngineError(message)))
    return {"plan": record.to_json()}


if __name__ == "__main__":
    main()
