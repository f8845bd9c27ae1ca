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
from functools import partial
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.model_check import check_config
from kvpipe.checkpoints.model_dir import cache_dir
from kvpipe.config.prompt import tokens_of_prompt
from kvpipe.config.schema import AUTO, EngineConfig, Kvpipe, from_plain
from kvpipe.engine import aot, devices, memory, multihost, physical, shapes, training
from kvpipe.errors import EngineError, InputError, KvpipeError, ending_of
from kvpipe.pipeline.ledger import (
    KV_PROGRAMS,
    POLICY_SCORES,
    TRAINER_PROGRAMS,
    TRAINER_SETS,
    KvTokens,
    PerDevice,
    PoolSize,
    Size,
)
from kvpipe.plan import fit, fold, kv_choice
from kvpipe.plan.continuation import planned_steps
from kvpipe.plan.inputs import check_inputs, check_split
from kvpipe.plan.pages import whole_pages
from kvpipe.plan.targets import CPU, Target
from kvpipe.records.run import Program, RunPlanned
from kvpipe.system.pipes import send
from kvpipe.trainer import aot as trainer_aot
from kvpipe.trainer.layout import lay_out

# Bytes of each device of a TPU that stay free for fragmentation, unless plan.reserve_bytes says it.
_RESERVE = 128 << 20
# Temporaries of the engine's steps on a CPU are about twice what these read, in float32.
_TIMES = 16
_VALUE_BYTES = 4


def plan_here(planned: Sequence[fold.PlannedStep], config: Kvpipe, model_dir: Path) -> fold.Plan:
    """Plan all steps of a pipeline for this machine's devices."""
    devices.check_devices(config.engine)
    count = devices.describe()["device_count"]
    # All hosts must make the same choices; those of virtual devices may have different memory.
    target = Target(devices.target_name(), count, min(multihost.each(devices.memory_bytes())))
    _check_model(config.engine, model_dir, count)
    device = None if memory.device_stats() is None else memory.counting_device()
    with physical.kept_in(cache_dir(config)):
        return plan_for(target, planned, config, model_dir, device, compiles=target.name == CPU)


def plan_for(
    target: Target,
    planned: Sequence[fold.PlannedStep],
    config: Kvpipe,
    model_dir: Path,
    device: Any = None,
    compiles: bool = False,
) -> fold.Plan:
    """Plan all steps of a pipeline for a target; this process must have as many devices.

    They may be of any kind. By ``device``, one of the target, its padding is known; None if it is
    not, or if the target pads nothing. With ``compiles`` programs may be compiled for the target
    here, as ``plan.compile`` says; else only what an earlier plan has compiled is in the plan.
    """
    found = shapes.of_devices_here(config.engine, model_dir)
    sizes, _ = _bytes(found.arrays(), device)
    kv = _kv_capacity(target, found, config, sizes, device)

    def plan_of(config: Kvpipe) -> fold.Plan:
        def make(steps: Sequence[fold.PlannedStep]) -> fold.Plan:
            return _plan_of(steps, target, config, model_dir, device, compiles, found, kv)

        return kv_choice.choose(planned, kv, make, partial(check_inputs, config, whole=False))

    plan = plan_of(config)
    if not (compiles and config.plan.micro_batch and config.trainer.learns and trains(planned)):
        return plan

    def fits(rows: int) -> bool:
        trainer = replace(config.trainer, micro_batch_size=rows)
        return plan_of(replace(config, trainer=trainer)).record.fit.fits

    most = replace(plan.record.fit, micro_batch_size=fit.most_rows(config.trainer, fits))
    return replace(plan, record=replace(plan.record, fit=most))


def _plan_of(
    planned: Sequence[fold.PlannedStep],
    target: Target,
    config: Kvpipe,
    model_dir: Path,
    device: Any,
    compiles: bool,
    found: shapes.EngineShapes,
    kv: fit.KvCapacity,
) -> fold.Plan:
    """Plan steps in which nothing is open.

    Unless that is asked for, nothing is compiled for a cache that does not fit even without
    temporaries: those of a cache that no host has would leave no smaller one to advise.
    """
    arrays = _arrays(found, planned, config)
    sizes, padding = _bytes(arrays, device)
    make = partial(_plan_with, planned, target, config, found, kv, arrays, sizes, padding, device)
    asked = compiles and config.plan.compile is True
    plan = make(_programs(planned, config, model_dir, target, asked))
    if (
        not compiles
        or asked
        or not plan.record.fit.fits
        or not _may_not_suffice(target, sizes, kv, config, arrays)
    ):
        return plan
    return make(_programs(planned, config, model_dir, target, compiles=True))


def _plan_with(
    planned: Sequence[fold.PlannedStep],
    target: Target,
    config: Kvpipe,
    found: shapes.EngineShapes,
    kv: fit.KvCapacity,
    arrays: Mapping[PoolSize, Sequence[Any]],
    sizes: Mapping[PoolSize, PerDevice],
    padding: Mapping[PoolSize, PerDevice],
    device: Any,
    programs: Sequence[Program],
) -> fold.Plan:
    """Plan steps whose programs are known, or left out."""
    sizes = {**sizes, **_code_sizes(programs, target.devices)}
    ledgers = fold.plan_ledgers(planned, sizes, target.devices, padding)
    peaks = fold.plan_peaks(planned, ledgers, _at_peak(planned, arrays, found, device))
    reserve = config.plan.reserve_bytes
    if reserve is None:
        reserve = 0 if target.name == CPU else _RESERVE
    temporaries = [fit.temporaries(item, programs) for item in planned]
    limited, limit = _limit(config, target)
    record = RunPlanned(
        target=target.name,
        devices=target.devices,
        sglang_jax=devices.describe()["sgl_jax_version"],
        phases=fold.planned_phases(planned, ledgers, peaks, temporaries),
        fit=fit.fit_of(planned, ledgers, limit, kv, temporaries, reserve, limited, peaks),
        programs=programs,
        padded=device is not None or target.name == CPU,
    )
    return fold.Plan(replace(record, warning=fit.warning(record)), ledgers, tuple(planned))


def _limit(config: Kvpipe, target: Target) -> tuple[bool, int]:
    """Return whether the bytes of a device that may be used are stated, and how many they are.

    Raises:
        InputError: the device has fewer.
    """
    stated = config.plan.limit_bytes
    if stated is not None and stated > target.hbm_bytes:
        raise InputError(
            f"plan.limit_bytes is {stated}, but a device of {target.name} has {target.hbm_bytes}"
        )
    return stated is not None, stated or target.hbm_bytes


def _arrays(
    found: shapes.EngineShapes, planned: Sequence[fold.PlannedStep], config: Kvpipe
) -> dict[PoolSize, list[Any]]:
    """Return the arrays of each size that a pool of these steps can have."""
    arrays = found.arrays(fold.kv_capacities(planned))
    if trains(planned):
        tree = training.source_shapes(found.sources, found.params)
        arrays |= lay_out(tree, found.mesh, config.trainer).sets
    return arrays


def _bytes(
    arrays: Mapping[PoolSize, Sequence[Any]], device: Any
) -> tuple[dict[PoolSize, PerDevice], dict[PoolSize, PerDevice]]:
    """Return the bytes on each device that arrays ask for, and those that it gives beyond them.

    Raises:
        InputError: an axis of the mesh does not divide an array.
    """
    try:
        sizes = {size: memory.bytes_of(held) for size, held in arrays.items()}
    except ValueError as error:
        raise InputError(
            f"engine.tp_size: the model cannot be divided over the mesh: {error}"
        ) from error
    if device is None:
        return sizes, {}
    given = {size: memory.bytes_of(held, device) for size, held in arrays.items()}
    return sizes, {size: memory.less(given[size], sizes[size]) for size in arrays}


def _at_peak(
    planned: Sequence[fold.PlannedStep],
    arrays: Mapping[PoolSize, Sequence[Any]],
    found: shapes.EngineShapes,
    device: Any,
) -> dict[PoolSize, PerDevice]:
    """Return the bytes on each device of the sizes that steps have at their peaks, with padding."""
    held = {Size.DUMMY_START: found.dummy_start, Size.LEAF: [found.largest_leaf], **arrays}
    wanted = {size for item in planned for size in item.effect.peak}
    return {size: memory.bytes_of(held[size], device) for size in wanted}


def _kv_capacity(
    target: Target,
    found: shapes.EngineShapes,
    config: Kvpipe,
    sizes: Mapping[PoolSize, PerDevice],
    device: Any,
) -> fit.KvCapacity:
    """Return the KV cache that the sizes are of, and the limit that the engine sets to it.

    An engine that starts empty sets it before it has parameters; the plan leaves room for them.
    """
    engine = config.engine
    # On the CPU each virtual device's engine sees the whole host and all of the host's parameters.
    on_host = target.devices // engine.nnodes
    sees, params = (
        (target.hbm_bytes * on_host, sum(sizes[Size.PARAMS][:on_host]))
        if target.name == CPU
        else (target.hbm_bytes, max(sizes[Size.PARAMS]))
    )

    def padded_bytes(tokens: int) -> int:
        return memory.bytes_of(found.arrays([tokens])[KvTokens(tokens)], device)[0]

    return fit.KvCapacity(
        device_bytes=sizes[Size.KV][0],
        tokens=whole_pages(engine.max_total_tokens, engine.page_size),
        page_size=engine.page_size,
        engine_bytes=fit.engine_kv_bytes(sees, params, engine.mem_fraction_static),
        padded_bytes=None if device is None else padded_bytes,
    )


def _may_not_suffice(
    target: Target,
    sizes: Mapping[PoolSize, PerDevice],
    kv: fit.KvCapacity,
    config: Kvpipe,
    arrays: Mapping[PoolSize, Sequence[Any]],
) -> bool:
    """Whether temporaries could fill this host: they are a few times what the engine's steps read.

    That is at most all arrays, and as much of the KV cache as the longest batch has. A training step
    computes as many values for each token as its matrices have outputs.
    """
    engine = config.engine
    longest = engine.max_running_requests * (engine.context_length or engine.max_total_tokens)
    read = sum(map(max, sizes.values())) + longest * kv.token_bytes
    if config.trainer.learns:
        outputs = sum(leaf.shape[0] for leaf in arrays.get(Size.TRAINER_PARAMS, ()))
        read += _VALUE_BYTES * outputs * config.trainer.rows * config.trainer.length
    return config.plan.compile == AUTO and target.name == CPU and read * _TIMES > target.hbm_bytes


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
    planned: Sequence[fold.PlannedStep],
    config: Kvpipe,
    model_dir: Path,
    target: Target,
    compiles: bool,
) -> tuple[Program, ...]:
    """Return the programs of the steps as compiled for the target, from the cache if present.

    With ``compiles`` what is not in the cache is compiled; else it is left out.

    Raises:
        CompileFinding: a step does not compile for the target, or copies what it should update.
    """
    if not config.plan.compile:
        return ()
    place = aot.Place(config.engine, model_dir, target.name, cache_dir(config), compiles)
    runs = {name for item in planned for name in item.effect.runs}
    programs = aot.engine_steps(place, tokens_of_prompt(config))
    programs += aot.kv_programs(place, sorted(runs.intersection(KV_PROGRAMS)))
    if config.engine.weight_digests:
        programs += aot.digest_program(place)
    if trains(planned):
        programs += trainer_aot.compiled(place, config.trainer, POLICY_SCORES in runs)
    return programs


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of a job, or the ending by an error."""
    config = from_plain(job["config"])
    # Here the target's devices are virtual CPU devices.
    config = replace(config, engine=replace(config.engine, device=CPU))
    try:
        planned = planned_steps(config)
        target, model_dir = Target(**job["target"]), Path(job["model_dir"])
        _check_model(config.engine, model_dir, target.devices)
        device = None if target.name == CPU else aot.described_device(target.name)
        with physical.kept_in(cache_dir(config)):
            record = plan_for(target, planned, config, model_dir, device, compiles=True).record
    except KvpipeError as error:
        return asdict(ending_of(error))
    except Exception as error:
        traceback.print_exc()
        message = f"the engine's shapes cannot be evaluated: {type(error).__name__}: {error}"
        return asdict(ending_of(EngineError(message)))
    return {"plan": record.to_json()}


if __name__ == "__main__":
    main()
