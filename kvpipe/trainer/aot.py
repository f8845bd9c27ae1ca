"""Compile the train step and the weight sync ahead of time for a TPU, on a machine without one."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from jax.errors import JaxRuntimeError

from kvpipe.config.schema import EngineConfig, TrainerConfig
from kvpipe.engine import shapes, training
from kvpipe.engine.aot import CompileFinding, target_mesh
from kvpipe.engine.program_cache import cached
from kvpipe.pipeline.ledger import TRAIN_STEP, WEIGHT_SYNC
from kvpipe.records.run import Program
from kvpipe.trainer.layout import lay_out
from kvpipe.trainer.step import compile_step


def compiled(
    engine: EngineConfig, config: TrainerConfig, model_dir: Path, topology: str, cache_dir: Path
) -> tuple[Program, ...]:
    """Return the trainer's programs compiled for a TPU topology, from the cache if present.

    The topology is e.g. ``v4:2x2x1``; this process needs as many virtual CPU devices.

    Raises:
        CompileFinding: a program does not compile for the target; a failure is not cached.
    """
    content = {
        # The trees and the mesh depend on these; the size of the KV cache does not change the
        # programs.
        "engine": {key: asdict(engine)[key] for key in ("tp_size", "dp_size", "dtype")},
        "trainer": asdict(config),
        "topology": topology,
    }
    return cached(
        content,
        model_dir,
        cache_dir,
        lambda: compile_programs(engine, config, model_dir, topology),
    )


def compile_programs(
    engine: EngineConfig, config: TrainerConfig, model_dir: Path, topology: str
) -> tuple[Program, ...]:
    """Compile the programs that :func:`compiled` returns, without the cache."""
    found = shapes.of_mesh(engine, model_dir, target_mesh(engine, topology), "tpu")
    tree = training.source_shapes(found.sources, found.params)
    layout = lay_out(tree, found.mesh, config)
    began = monotonic()
    try:
        train = _program(TRAIN_STEP, compile_step(layout, config).used, began)
        began = monotonic()
        lowered = training.lowered(found.sources, found.params, layout.params)
        used = [program.compile().memory_analysis() for program in lowered.values()]
        return train, _program(WEIGHT_SYNC, used, began)
    except JaxRuntimeError as error:
        raise CompileFinding(
            f"the trainer's programs do not compile for {topology}: {str(error)[:300]}"
        ) from error


def _program(name: str, used: Sequence[Any], began: float) -> Program:
    """Return programs that run one at a time as one, from XLA's memory analysis of each."""
    return Program(
        name=name,
        requests=0,
        tokens=0,
        code_bytes=sum(each.generated_code_size_in_bytes for each in used),
        temp_bytes=max(each.temp_size_in_bytes for each in used),
        compile_s=round(monotonic() - began, 3),
    )
