"""Trained weights in a live engine: cast, laid out and placed on the devices, one set at any time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.safetensors import Tensors
from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import EngineError
from tests.conftest import greedy

NAME = "model.layers.1.mlp.up_proj.weight"
PROMPT = "The KV cache is dropped and rebuilt."


@pytest.fixture
def trainer(real_engine: Any, tiny_weights: Tensors) -> Iterator[Any]:
    """A trainer of the shared engine's model, beside it."""
    from kvpipe.engine import training
    from kvpipe.trainer.layout import lay_out
    from kvpipe.trainer.state import Trainer

    config = TrainerConfig(learning_rate=0.01)
    shapes = training.shapes(real_engine)
    made = Trainer(lay_out(shapes, training.mesh(real_engine), config), config)
    training.check(real_engine, tiny_weights)
    made.start(tiny_weights)
    yield made
    made.drop()


def in_engine(engine: Any) -> dict[str, bytes]:
    from kvpipe.engine import weights

    return {path: np.asarray(leaf).tobytes() for path, leaf in weights.parameters(engine).items()}


@pytest.mark.nightly(finds="a cast that trainer and digest get wrong alike")
def test_a_sync_gives_what_a_host_cast_of_the_trained_tree_gives_bit_for_bit(
    real_engine: Any, trainer: Any
) -> None:
    """The shared engine has 2 KV heads on 4 devices, so that each is there twice."""
    from kvpipe.engine import training, weights
    from kvpipe.engine.compile_count import CompileCounter

    before = in_engine(real_engine)
    kinds = {p: (a.dtype, a.sharding) for p, a in weights.parameters(real_engine).items()}
    first = real_engine.generate(PROMPT, greedy(8))
    digest = real_engine.proof.whole
    training.sync(real_engine, trainer.params)  # the weights that it has already
    assert (real_engine.proof.whole, real_engine.proof.wrong) == (digest, ())
    assert in_engine(real_engine) == before
    again = real_engine.generate(PROMPT, greedy(8))
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, 0)

    trainer.step()
    trained = {name: np.asarray(array) for name, array in trainer.params.items()}
    assert {array.dtype for array in trained.values()} == {np.dtype("float32")}
    compilations = CompileCounter()
    compilations.take()
    change = training.sync(real_engine, trainer.params)
    output = real_engine.generate(PROMPT, greedy(8))
    assert compilations.take().programs == 0
    assert change.fields["num_params"] == len(before)
    assert (output.cached_tokens, output.token_ids != first.token_ids) == (0, True)
    synced = in_engine(real_engine)
    assert all(synced[path] != before[path] for path in before)
    found = {p: (a.dtype, a.sharding) for p, a in weights.parameters(real_engine).items()}
    assert found == kinds

    proof = real_engine.proof
    assert proof.proven and not proof.wrong and proof.whole != digest
    weights.stream(real_engine, trained)
    assert in_engine(real_engine) == synced
    assert real_engine.proof == proof


def test_while_weights_are_synced_the_devices_never_hold_more_than_one_set_beside_the_trainer(
    real_engine: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from kvpipe.engine import memory, training, weights

    memory.collect_garbage()
    whole = sum(memory.bytes_of(jax.live_arrays()))
    held: list[int] = []
    mover = training._mover

    def watched(leaf: Any, like: Any, given: Any) -> Any:
        def move(weight: Any) -> Any:
            moved = jax.block_until_ready(mover(leaf, like, given)(weight))
            held.append(sum(memory.bytes_of(jax.live_arrays())))
            return moved

        return move

    monkeypatch.setattr(training, "_mover", watched)
    training.sync(real_engine, trainer.params)
    assert len(held) == len(weights.parameters(real_engine))
    assert max(held) <= whole


def test_a_sync_brings_weights_that_are_away_and_nothing_is_left_of_the_old_ones(
    real_engine: Any, trainer: Any
) -> None:
    from kvpipe.engine import memory, training, weights

    before, whole = in_engine(real_engine), sum(memory.bytes_in_use())
    set_bytes = weights.live_bytes(real_engine)
    weights.drop(real_engine)
    assert training.sync(real_engine, trainer.params).changed_bytes == set_bytes
    assert in_engine(real_engine) == before
    assert sum(memory.bytes_in_use()) == whole


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: None, rf"1 of 38 weights are missing: '{NAME}'"),
        (lambda a: a[:-1], rf"'{NAME}' has shape \(1023, 512\)"),
        (lambda a: a.astype("int32"), rf"'{NAME}' has dtype int32"),
        (lambda a: a.at[3, 4].set(np.nan), rf"not finite: '{NAME}'"),
        (lambda a: a.at[-1, -1].set(-np.inf), rf"not finite: '{NAME}'"),
        (lambda a: a.at[0, 0].set(3.4e38), rf"not finite: '{NAME}'"),  # infinite in bfloat16
    ],
)
def test_trained_weights_that_are_refused_leave_the_engine_its_arrays_and_its_prefix_cache(
    real_engine: Any, trainer: Any, wrong: Any, message: str
) -> None:
    from kvpipe.engine import training, weights

    before = weights.parameters(real_engine)
    real_engine.generate(PROMPT, greedy(2))
    changed = wrong(trainer.params[NAME])
    tree = {n: a for n, a in trainer.params.items() if n != NAME}
    given = tree if changed is None else tree | {NAME: changed}
    with pytest.raises(EngineError, match=message):
        training.sync(real_engine, given)
    assert all(before[path] is leaf for path, leaf in weights.parameters(real_engine).items())
    assert real_engine.generate(PROMPT, greedy(2)).cached_tokens > 0


def test_the_tree_to_train_is_the_checkpoints_own(real_engine: Any, tiny_weights: Tensors) -> None:
    from kvpipe.engine import training

    shapes = training.shapes(real_engine)
    assert shapes == {name: array.shape for name, array in tiny_weights.items()}
    with pytest.raises(EngineError, match="38 of 38 weights are missing"):
        training.check(real_engine, {})


def test_programs_of_a_sync_are_one_for_each_kind_of_parameter(
    real_engine: Any, trainer: Any
) -> None:
    from kvpipe.engine import training
    from kvpipe.engine.params import ParamTable
    from kvpipe.engine.weight_map import leaf_sources

    table = ParamTable(real_engine)
    leaves = leaf_sources(real_engine, table)
    lowered = training.lowered(leaves, table.blueprint, trainer._layout.params)
    assert set(lowered) <= set(trainer.params)
    kinds = {
        (leaf.transpose, leaf.heads, table.blueprint[path], trainer.params[leaf.source].shape)
        for path, leaf in leaves.items()
    }
    assert len(lowered) == len(kinds) < len(leaves)
