"""Plan with the sizes of the installed engine; needs jax, so it runs in a child process.

:mod:`kvpipe.plan.fold` has the fold over the effects, without jax; :mod:`kvpipe.parent.planner_client` is the
parent's side.
"""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
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
    here, as ``plan.compile`` says; else the plan has only the programs that an earlier one
    compiled.
    """
    found = shapes.of_devices_here(config.engine, model_dir)
    kv = _kv_capacity(target, found, config, device)
    inputs = _Inputs(target, config, model_dir, device, compiles, found, kv)

    def plan_of(inputs: _Inputs) -> fold.Plan:
        refuse = partial(check_inputs, inputs.config, whole=False)
        return kv_choice.choose(planned, kv, partial(_plan_of, inputs), refuse)

    plan = plan_of(inputs)
    if not (compiles and config.plan.micro_batch and config.trainer.learns and trains(planned)):
        return plan

    def fits(rows: int) -> bool:
        trainer = replace(config.trainer, micro_batch_size=rows)
        return plan_of(replace(inputs, config=replace(config, trainer=trainer))).record.fit.fits

    most = replace(plan.record.fit, micro_batch_size=fit.most_rows(config.trainer, fits))
    return replace(plan, record=replace(plan.record, fit=most))


@dataclass(frozen=True)
class _Inputs:
    """Inputs of every plan for a target, whatever its steps are.

    Attributes:
        target: the target; this process has as many devices.
        config: the config of the run.
        model_dir: directory of the model.
        device: one of the target's, whose padding is known; None if it is not.
        compiles: whether programs may be compiled for the target here.
        found: shapes of the engine's arrays.
        kv: the engine's KV cache and its limit.
    """

    target: Target
    config: Kvpipe
    model_dir: Path
    device: Any
    compiles: bool
    found: shapes.EngineShapes
    kv: fit.KvCapacity

    @cached_property
    def trainer_sets(self) -> dict[Size, list[Any]]:
        """The arrays of each set of a trainer, which are the same for each action of ``kv: auto``."""
        tree = training.source_shapes(self.found.sources, self.found.params)
        return lay_out(tree, self.found.mesh, self.config.trainer).sets


@dataclass(frozen=True)
class _Arrays:
    """Arrays of each size that a pool of some steps can have.

    Attributes:
        of_size: the shapes of the arrays.
        sizes: the bytes that they need on each device.
        padding: the bytes that each device adds to them; empty if that is not known.
    """

    of_size: Mapping[PoolSize, Sequence[Any]]
    sizes: Mapping[PoolSize, PerDevice]
    padding: Mapping[PoolSize, PerDevice]


def _plan_of(inputs: _Inputs, planned: Sequence[fold.PlannedStep]) -> fold.Plan:
    """Plan steps in which nothing is open.

    Unless that is asked for, nothing is compiled for a cache that does not fit even without
    temporaries: those of a cache that no host has would leave no smaller one to advise.
    """
    arrays = _arrays(inputs, planned)
    asked = inputs.compiles and inputs.config.plan.compile is True
    plan = _plan_with(inputs, planned, arrays, _programs(inputs, planned, asked))
    if (
        not inputs.compiles
        or asked
        or not plan.record.fit.fits
        or not _may_not_suffice(inputs.target, arrays, inputs.kv, inputs.config)
    ):
        return plan
    return _plan_with(inputs, planned, arrays, _programs(inputs, planned, compiles=True))


def _plan_with(
    inputs: _Inputs,
    planned: Sequence[fold.PlannedStep],
    arrays: _Arrays,
    programs: Sequence[Program],
) -> fold.Plan:
    """Plan steps whose programs are known, or left out."""
    target, config = inputs.target, inputs.config
    sizes = {**arrays.sizes, **_code_sizes(programs, target.devices)}
    ledgers = fold.plan_ledgers(planned, sizes, target.devices, arrays.padding)
    peaks = fold.plan_peaks(planned, ledgers, _at_peak(inputs, planned, arrays))
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
        fit=fit.fit_of(planned, ledgers, limit, inputs.kv, temporaries, reserve, limited, peaks),
        programs=programs,
        padded=inputs.device is not None or target.name == CPU,
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
            f"plan.limit_bytes is {stated}, but a device of {target.name} has {target.hbm_bytes}; "
            "it must be at most that"
        )
    return stated is not None, stated or target.hbm_bytes


def _arrays(inputs: _Inputs, planned: Sequence[fold.PlannedStep]) -> _Arrays:
    """Return the arrays of each size that a pool of these steps can have.

    Raises:
        InputError: an axis of the mesh does not divide an array.
    """
    found, device = inputs.found, inputs.device
    arrays = found.arrays(fold.kv_capacities(planned))
    if trains(planned):
        arrays |= inputs.trainer_sets
    sizes = _bytes(arrays)
    if device is None:
        return _Arrays(arrays, sizes, {})
    given = {size: memory.bytes_of(held, device) for size, held in arrays.items()}
    return _Arrays(arrays, sizes, {size: memory.less(given[size], sizes[size]) for size in arrays})


def _bytes(arrays: Mapping[PoolSize, Sequence[Any]]) -> dict[PoolSize, PerDevice]:
    """Return the bytes that arrays need on each device, without padding.

    Raises:
        InputError: an axis of the mesh does not divide an array.
    """
    try:
        return {size: memory.bytes_of(held) for size, held in arrays.items()}
    except ValueError as error:
        raise InputError(
            f"engine.tp_size: the model cannot be divided over the mesh: {error}"
        ) from error


def _at_peak(
    inputs: _Inputs, planned: Sequence[fold.PlannedStep], arrays: _Arrays
) -> dict[PoolSize, PerDevice]:
    """Return the bytes on each device of the sizes that steps have at their peaks, with padding."""
    found = inputs.found
    start = {Size.DUMMY_START: found.dummy_start, Size.LEAF: [found.largest_leaf]}
    held: dict[PoolSize, Sequence[Any]] = {**start, **arrays.of_size}
    wanted = {size for item in planned for size in item.effect.peak}
    return {size: memory.bytes_of(held[size], inputs.device) for size in wanted}


def _kv_capacity(
    target: Target, found: shapes.EngineShapes, config: Kvpipe, device: Any
) -> fit.KvCapacity:
    """Return the engine's KV cache, and the limit that the engine sets to its capacity.

    An engine that starts empty sets the limit before it has parameters; the plan leaves room for
    them.
    """
    engine, sizes = config.engine, _bytes(found.arrays())
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


def _may_not_suffice(target: Target, arrays: _Arrays, kv: fit.KvCapacity, config: Kvpipe) -> bool:
    """Whether temporaries could fill this host: they are a few times what the engine's steps read.

    That is at most all arrays, and as much of the KV cache as the longest batch has. A training step
    computes as many values for each token as its matrices have outputs.
    """
    engine = config.engine
    longest = engine.max_running_requests * (engine.context_length or engine.max_total_tokens)
    read = sum(map(max, arrays.sizes.values())) + longest * kv.token_bytes
    if config.trainer.learns:
        outputs = sum(leaf.shape[0] for leaf in arrays.of_size.get(Size.TRAINER_PARAMS, ()))
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
    inputs: _Inputs, planned: Sequence[fold.PlannedStep], compiles: bool
) -> tuple[Program, ...]:
    """Return the programs of the steps as compiled for the target, from the cache if present.

    With ``compiles`` what is not in the cache is compiled; else it is left out.

    Raises:
        CompileFinding: a step does not compile for the target, or copies what it should update.
    """
    config = inputs.config
    if not config.plan.compile:
        return ()
    place = aot.Place(
        config.engine, inputs.model_dir, inputs.target.name, cache_dir(config), compiles
    )
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
