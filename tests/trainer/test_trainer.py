"""The trainer by itself: what is planned is what it takes, and it comes back from the host whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import InputError, PhaseError
from kvpipe.pipeline.ledger import Size
from tests.conftest import DEVICES, engine_config

pytestmark = pytest.mark.early

PRECISIONS = {
    "float32": TrainerConfig(),
    "bfloat16_gradients": TrainerConfig(gradients_dtype="bfloat16", mu_dtype="bfloat16"),
    "float32_gradients": TrainerConfig(dtype="bfloat16", gradients_dtype="float32"),
    "bfloat16": TrainerConfig(dtype="bfloat16"),
}
ONE_MESH = pytest.mark.nightly(
    finds="a trainer's leaf that one model or mesh alone places otherwise"
)
MIXED = pytest.mark.nightly(finds="a trainer whose parameters are bfloat16 and are rounded twice")
SHAPES = {"matrix": (12, 8), "odd": (5, 3)}


def mesh(data: int, tensor: int) -> Any:
    import jax

    devices = np.array(jax.devices()).reshape(data, tensor)
    return jax.sharding.Mesh(devices, ("data", "tensor"))


def sizes_of(layout: Any) -> dict[Size, Any]:
    """Return the bytes per device of each set of a trainer."""
    from kvpipe.engine import memory

    return {size: memory.bytes_of(arrays) for size, arrays in layout.sets.items()}


def trainer(config: TrainerConfig, data: int = 2, tensor: int = 2) -> Any:
    """Return a trainer of small shapes, its layout, and random parameters for it."""
    from kvpipe.trainer.layout import lay_out
    from kvpipe.trainer.state import Trainer

    layout = lay_out(SHAPES, mesh(data, tensor), config)
    made = Trainer(layout, config)
    random = np.random.default_rng(0)
    given = {name: random.normal(size=shape).astype("f") for name, shape in SHAPES.items()}
    return made, layout, given


def values(tree: Any) -> list[Any]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_each_axis_of_the_mesh_parts_the_longest_dimension_that_it_divides_and_none_twice(
    four_devices: None,
) -> None:
    from kvpipe.trainer.layout import lay_out

    def specs(data: int, tensor: int) -> dict[str, Any]:
        shapes = SHAPES | {"tall": (64, 6), "bias": (8,), "norm": (7,)}
        params = lay_out(shapes, mesh(data, tensor), TrainerConfig()).params
        return {name: tuple(leaf.sharding.spec) for name, leaf in params.items()}

    assert specs(2, 2) == {
        "matrix": ("data", "tensor"),
        "tall": ("data", "tensor"),
        "odd": (None, None),
        "bias": ("data",),
        "norm": (None,),
    }
    assert specs(1, 4)["tall"] == ("tensor", None)
    assert specs(4, 1)["matrix"] == ("data", None)


@pytest.mark.parametrize(
    ("precision", "data", "tensor"),
    [
        ("float32", 1, 4),
        ("bfloat16_gradients", 2, 2),
        pytest.param("float32_gradients", 2, 2, marks=MIXED),
        pytest.param("bfloat16", 4, 1, marks=MIXED),
    ],
)
def test_a_step_is_what_optax_does_and_every_set_takes_the_planned_bytes_on_every_device(
    four_devices: None, precision: str, data: int, tensor: int
) -> None:
    import jax
    import optax

    from kvpipe.trainer.layout import optimizer

    config = PRECISIONS[precision]
    made, layout, given = trainer(config, data, tensor)

    def kinds() -> list[Any]:
        return [(a.shape, a.dtype, a.sharding) for arrays in made.sets.values() for a in arrays]

    change = made.start(given)
    planned, begun = sizes_of(layout), kinds()
    assert sizes_of(made) == planned
    assert change.nbytes == change.changed_bytes == sum(map(sum, planned.values()))

    params = {name: jax.numpy.asarray(array).astype(config.dtype) for name, array in given.items()}
    transformation = optimizer(config)
    moments = transformation.init(params)
    for _ in range(2):
        report = made.step()
        gradients = {n: jax.numpy.asarray(np.asarray(g)) for n, g in made.gradients.items()}
        updates, moments = transformation.update(
            optax.tree.cast_like(gradients, params), moments, params
        )
        params = optax.apply_updates(params, updates)
    loose = 1e-6 if precision == "float32" else 2e-2  # XLA may keep more bits where it fuses
    expected = values((params, moments))
    for found, wanted in zip(values((made.params, made.moments)), expected, strict=True):
        np.testing.assert_allclose(found.astype("f"), wanted.astype("f"), rtol=loose, atol=loose)
    assert not any(map(np.array_equal, values(made.params), values(given)))

    assert (sizes_of(made), kinds()) == (planned, begun)
    assert report.in_place_bytes == report.set_bytes == change.nbytes
    step_memory = report.fields["step_memory"]
    assert report.peak_bytes == step_memory["peak_bytes"]
    assert report.peak_bytes == step_memory["in_use_bytes"] + step_memory["temp_bytes"]
    made.drop()
    assert not any(made.sets.values())


def test_the_moments_are_counted_with_optaxs_own_step_counter(four_devices: None) -> None:
    _, layout, _ = trainer(TrainerConfig(), 1, DEVICES)
    sizes = sizes_of(layout)
    twice = tuple(2 * size for size in sizes[Size.TRAINER_PARAMS])
    assert sizes[Size.TRAINER_MOMENTS] == tuple(size + 4 for size in twice)


@pytest.mark.parametrize(
    ("model", "tp_size"),
    [
        ("Qwen2ForCausalLM", 4),
        ("Qwen3ForCausalLM", 2),
        pytest.param("Qwen2ForCausalLM", 1, marks=ONE_MESH),
        pytest.param("LlamaForCausalLM", 4, marks=ONE_MESH),
    ],
)
def test_a_trainer_of_a_models_own_tree_takes_what_is_planned_of_its_config_alone(
    four_devices: None, model_cache: Path, model: str, tp_size: int
) -> None:
    from kvpipe.engine import compat, shapes, training
    from kvpipe.trainer.layout import lay_out
    from kvpipe.trainer.state import Trainer

    tied = model == "Qwen2ForCausalLM"
    shape = TinyModel(
        architecture=model, num_hidden_layers=1, vocab_size=320, tie_word_embeddings=tied
    )
    directory = ensure(shape, model_cache)
    on = compat.device_mesh(tp_size)
    config = engine_config(tp_size=tp_size, dp_size=DEVICES // tp_size)
    found = shapes.of_mesh(config, directory, on, "cpu")
    tree = training.source_shapes(found.sources, found.params)
    runner = found.runner
    del found
    assert not vars(
        runner
    )  # later versions hold it, with its random keys, in what Python cannot see
    checkpoint = open_checkpoint(directory)
    assert tree == {name: checkpoint[name].shape for name in tree}
    assert sum(np.prod(shape) for shape in tree.values()) == sum(
        a.size for a in checkpoint.values()
    )
    layout = lay_out(tree, on, TrainerConfig())
    made = Trainer(layout, TrainerConfig())
    made.start(checkpoint)
    assert sizes_of(made) == sizes_of(layout)
    for name, array in made.params.items():
        assert np.array_equal(np.asarray(array), checkpoint[name].astype(np.float32)), name
    made.drop()


def test_gradients_are_of_the_seed_the_step_and_the_name_and_not_of_the_mesh(
    four_devices: None,
) -> None:
    import jax

    from kvpipe.trainer.gradients import compile_seeded, seeded_inputs
    from kvpipe.trainer.layout import lay_out

    def gradient(seed: int, step: int, name: str, data: int) -> Any:
        config = TrainerConfig(seed=seed)
        like = lay_out({name: (8, 4)}, mesh(data, DEVICES // data), config).gradients[name]
        last = jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
        return np.asarray(compile_seeded(like, seed)(last, *seeded_inputs(name, step)))

    first = gradient(0, 0, "a", 2)
    assert np.array_equal(first, gradient(0, 0, "a", 4))
    for seed, step, name in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert not np.any(first == gradient(seed, step, name, 2))


def test_a_trainer_comes_back_from_the_host_bit_for_bit_and_goes_on_as_if_it_had_stayed(
    four_devices: None,
) -> None:
    from kvpipe.engine import memory
    from kvpipe.engine.compile_count import CompileCounter

    config = TrainerConfig(mu_dtype="bfloat16")
    stayed, layout, given = trainer(config)
    away, _, _ = trainer(config)
    before = sum(memory.bytes_in_use())
    one = sum(map(sum, sizes_of(layout).values()))
    for each in (stayed, away):
        each.start(given)
        each.step()
    counter = CompileCounter()
    counter.take()
    for _ in range(2):
        gone = away.offload()
        assert gone.freed_bytes == gone.nbytes == one
        assert (away.params, away.moments) == (layout.params, layout.moments)
        back = away.restore()
        assert (back.changed_bytes, back.fields["host_bytes"]) == (one, 0)
        assert not any(gradient.any() for gradient in values(away.gradients))
        both = [values((t.params, t.moments)) for t in (stayed, away)]
        assert all(map(np.array_equal, *both))
        # Once a parameter, not once for each device that has a copy of it.
        assert gone.fields["host_bytes"] == sum(array.nbytes for array in both[0])
        for each in (stayed, away):
            each.step()
    both = [values((t.params, t.gradients, t.moments)) for t in (stayed, away)]
    assert all(map(np.array_equal, *both))
    assert counter.take().count == 0
    away.offload()
    assert away.drop().changed_bytes == 0
    stayed.drop()
    assert sum(memory.bytes_in_use()) == before


def test_gradients_that_are_not_finite_end_the_run_with_the_numbers_and_what_may_help(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.trainer.gradients import Seeded

    made, _, given = trainer(TrainerConfig())
    made.start(given)
    call = Seeded.__call__

    def infinite(self: Any, *args: Any) -> Any:
        gradients, _ = call(self, *args)
        return {name: gradient * np.float32(np.inf) for name, gradient in gradients.items()}, {}

    monkeypatch.setattr(Seeded, "__call__", infinite)
    with pytest.raises(PhaseError, match=r"training step 1: gradient_norm is inf; .*clip_norm may"):
        made.step()
    made.drop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "trainer.dtype is 'float16'; did you mean 'bfloat16'"),
        ({"mu_dtype": "f32"}, "trainer.mu_dtype is 'f32'"),
        ({"gradients_dtype": "float64"}, "trainer.gradients_dtype is 'float64'"),
        ({"learning_rate": -1.0}, "trainer.learning_rate is -1.0, it must be at least 0"),
        ({"weight_decay": -0.1}, "trainer.weight_decay is -0.1"),
        ({"seed": -1}, "trainer.seed is -1"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainerConfig(**options)
