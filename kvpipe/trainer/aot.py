"""Compile the train step and the weight sync ahead of time for a TPU, on a machine without one."""

from collections.abc import Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any

from jax.errors import JaxRuntimeError

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine import shapes, training
from kvpipe.engine.aot import CompileFinding, Place, not_in_place
from kvpipe.engine.forward import Forward
from kvpipe.pipeline.ledger import POLICY_SCORES, TRAIN_STEP, WEIGHT_SYNC
from kvpipe.records.run import Program
from kvpipe.trainer.layout import lay_out
from kvpipe.trainer.scoring import compile_scorers
from kvpipe.trainer.step import compile_step

# What a trainer learns from; its programs do not depend on that.
_NOT_COMPILED = ("data", "reward", "reward_options")


def compiled(place: Place, config: TrainerConfig) -> tuple[Program, ...]:
    """Return the trainer's programs compiled for a target, from the cache if present.

    Raises:
        CompileFinding: a program does not compile, or the update is not in place.
    """
    content = {
        # The trees and the mesh depend on these; the size of the KV cache does not change the
        # programs.
        "engine": {key: asdict(place.config)[key] for key in ("tp_size", "dp_size", "dtype")},
        "trainer": {
            key: value for key, value in asdict(config).items() if key not in _NOT_COMPILED
        },
    }
    return place.cached(content, lambda: compile_programs(place, config))


def compile_programs(place: Place, config: TrainerConfig) -> tuple[Program, ...]:
    """Compile the programs that :func:`compiled` returns, without the cache."""
    found = shapes.of_mesh(place.config, place.model_dir, place.mesh, place.platform)
    tree = training.source_shapes(found.sources, found.params)
    layout = lay_out(tree, found.mesh, config)
    forward = Forward.of_shapes(found) if config.learns else None
    began = monotonic()
    try:
        scorers: list[Program] = []
        reference = None
        if forward is not None and config.rewarded:
            own, reference = compile_scorers(layout, config, forward)
            scorers.append(_program(POLICY_SCORES, [own.used], began, own.temp_bytes))
            began = monotonic()
        step = compile_step(layout, config, forward, reference)
        if step.in_place_bytes != step.set_bytes:
            raise not_in_place(TRAIN_STEP, step.in_place_bytes, step.set_bytes, place.target)
        train = _program(TRAIN_STEP, step.used, began, step.temp_bytes, step.in_place_bytes)
        began = monotonic()
        lowered = training.lowered(found.sources, found.params, layout.params)
        used: list[Any] = [each.compile().memory_analysis() for each in lowered.values()]
        temp_bytes = max(each.temp_size_in_bytes for each in used)
        return train, _program(WEIGHT_SYNC, used, began, temp_bytes), *scorers
    except JaxRuntimeError as error:
        raise CompileFinding(
            f"the trainer's programs do not compile for {place.target}: {str(error)[:300]}"
        ) from error


def _program(
    name: str, used: Sequence[Any], began: float, temp_bytes: int, in_place_bytes: int = 0
) -> Program:
    """Return programs that run one at a time as one, from XLA's memory analysis of each."""
    return Program(
        name=name,
        requests=0,
        tokens=0,
        code_bytes=sum(each.generated_code_size_in_bytes for each in used),
        temp_bytes=temp_bytes,
        compile_s=round(monotonic() - began, 3),
        in_place_bytes=in_place_bytes,
    )
