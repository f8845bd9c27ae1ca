"""Compile the train step and the weight sync ahead of time for a TPU, on a machine without one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic
from typing import Any

from jax.errors import JaxRuntimeError

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine import memory, shapes, training
from kvpipe.engine.aot import CompileFinding, Place, not_in_place
from kvpipe.engine.forward import Forward
from kvpipe.pipeline.ledger import GRADIENTS, POLICY_SCORES, TRAIN_STEP, WEIGHT_SYNC
from kvpipe.records.run import Program
from kvpipe.trainer.gradients import compile_gradients
from kvpipe.trainer.layout import Layout, lay_out
from kvpipe.trainer.scoring import Scorer
from kvpipe.trainer.step import compile_update

# The gradients do not depend on what becomes of them, nor on how many micro-batches there are.
_NOT_OF_GRADIENTS = {
    *("data", "batch_size", "micro_batch_size", "mu_dtype", "learning_rate", "warmup_steps"),
    *("decay_steps", "clip_norm", "weight_decay", "seed", "reward", "reward_options"),
}
# The other programs do not depend on what the gradients are of.
_NOT_OF_OTHERS = {
    *(
        "data",
        "batch_size",
        "micro_batch_size",
        "length",
        "loss",
        "seed",
        "reward",
        "reward_options",
    ),
    *("clip_ratio", "kl_coefficient", "entropy_coefficient"),
}


def compiled(place: Place, config: TrainerConfig, scores: bool = False) -> tuple[Program, ...]:
    """Return the trainer's programs compiled for a target, from the cache if present.

    With ``scores`` the forward pass over samples is one of them, whatever the loss is.

    The gradients of a large model take minutes to compile, so they are kept by themselves.

    Raises:
        CompileFinding: a program does not compile, or is not in place.
    """
    trainer = asdict(config)
    # The trees and the mesh depend on these; the size of the KV cache does not change the programs.
    engine = {key: asdict(place.config)[key] for key in ("tp_size", "dp_size", "dtype")}
    options = training.shared_code(place.platform)
    of_gradients = {key: trainer[key] for key in trainer.keys() - _NOT_OF_GRADIENTS}
    of_gradients |= {"rows": config.rows} | options
    # The programs of a loss on rewards are kept without that key.
    scored = {"scores": True} if scores and not config.rewarded else {}
    of_others = {key: trainer[key] for key in trainer.keys() - _NOT_OF_OTHERS}
    of_others |= options
    return (
        *place.cached(
            {"engine": engine, "gradients": of_gradients} | scored,
            lambda: compile_loss_programs(place, config, scores),
        ),
        *place.cached(
            {"engine": engine, "trainer": of_others}, lambda: compile_programs(place, config)
        ),
    )


def compile_gradient_program(place: Place, config: TrainerConfig) -> Program:
    """Compile the gradients of a micro-batch, without the cache."""
    with _findings(place):
        found, layout = _shapes(place, config)
        began = monotonic()
        forward = Forward.of_shapes(found) if config.learns else None
        gradients = compile_gradients(layout, config, forward)
        if gradients.copied_bytes:
            held = sum(map(memory.shard_bytes, layout.gradients.values()))
            raise not_in_place(GRADIENTS, held - gradients.copied_bytes, held, place.target)
        in_place = sum(used.alias_size_in_bytes for used in gradients.used)
        return _program(GRADIENTS, gradients.used, began, gradients.temp_bytes, in_place)


def compile_loss_programs(place: Place, config: TrainerConfig, scores: bool) -> tuple[Program, ...]:
    """Compile the gradients of the loss and, with ``scores``, the scores of samples, without the cache."""
    gradients = compile_gradient_program(place, config)
    if not (scores or config.rewarded):
        return (gradients,)
    with _findings(place):
        found, layout = _shapes(place, config)
        began = monotonic()
        scorer = Scorer.compiled(layout.params, layout, config, Forward.of_shapes(found))
        return gradients, _program(POLICY_SCORES, scorer.used, began, scorer.temp_bytes)


def compile_programs(place: Place, config: TrainerConfig) -> tuple[Program, ...]:
    """Compile the trainer's other programs that :func:`compiled` returns, without the cache."""
    with _findings(place):
        found, layout = _shapes(place, config)
        began = monotonic()
        update: Any = compile_update(layout, config).memory_analysis()
        in_place, held = update.alias_size_in_bytes, update.argument_size_in_bytes
        if in_place != held:
            raise not_in_place(TRAIN_STEP, in_place, held, place.target)
        train = _program(TRAIN_STEP, [update], began, update.temp_size_in_bytes, in_place)
        began = monotonic()
        lowered = training.lowered(found.sources, found.params, layout.params)
        used: list[Any] = [each.compile().memory_analysis() for each in lowered.values()]
        temp_bytes = max(each.temp_size_in_bytes for each in used)
        return train, _program(WEIGHT_SYNC, used, began, temp_bytes)


@contextmanager
def _findings(place: Place) -> Iterator[None]:
    """Turn the compiler's refusal into a finding of the target."""
    try:
        yield
    except JaxRuntimeError as error:
        raise CompileFinding(
            f"the trainer's programs do not compile for {place.target}: {str(error)[:300]}"
        ) from error


def _shapes(place: Place, config: TrainerConfig) -> tuple[shapes.EngineShapes, Layout]:
    """Return the engine's shapes on the target, and the trainer's."""
    found = shapes.of_mesh(place.config, place.model_dir, place.mesh, place.platform)
    tree = training.source_shapes(found.sources, found.params)
    return found, lay_out(tree, found.mesh, config)


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
