"""A trainer on the disk: a new one goes on from it as if there had been no other."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import InputError
from kvpipe.pipeline.ledger import Size
from kvpipe.pipeline.output import Output
from tests.helpers_config import compose_plain, config_of
from tests.trainer.test_trainer import trainer, values

OUTPUT = Output("ab", (1, 2), 3, 0, {"id": 1}, 2, False, "digest", ("digest",))


def context(directory, made=None, resume_after=None):
    plain = compose_plain("+experiment=tiny_sft", "trainer.checkpoint_every=1")
    plain["trainer"]["checkpoint_dir"] = str(directory)
    config = config_of(plain | {"resume_after": resume_after})
    return SimpleNamespace(config=config, trainer=made, outputs={})


def test_a_resumed_trainer_goes_on_bit_for_bit_as_the_one_that_was_saved(four_devices, tmp_path):
    from kvpipe.trainer import checkpoint

    config = TrainerConfig(mu_dtype="bfloat16", warmup_steps=3)
    stayed, _, given = trainer(config)
    stayed.start(given)
    stayed.losses = [0.1 + 0.2]
    ctx = context(tmp_path, stayed)
    ctx.outputs = {f"step{mark}": OUTPUT for mark in ("", "#2", "#3")}
    for cycle in (2, 3):
        stayed.step()
        stayed.offload()
        fields = checkpoint.save(ctx, cycle)
        stayed.restore()
    assert [path.name for path in tmp_path.iterdir()] == ["cycle-3"]
    sizes = stayed.layout.sets
    saved = [*sizes[Size.TRAINER_PARAMS], *sizes[Size.TRAINER_MOMENTS]]
    assert fields["checkpoint_bytes"] == sum(like.size * like.dtype.itemsize for like in saved)

    resumed, *_ = trainer(config)
    later = context(tmp_path, resume_after=3)
    change = checkpoint.resume(resumed, later)
    assert change.nbytes == change.changed_bytes
    assert (resumed.steps, resumed.losses) == (2, [0.1 + 0.2])
    assert later.outputs == {"step": OUTPUT, "step#3": OUTPUT}
    both = [values((made.params, made.moments)) for made in (stayed, resumed)]
    assert all(map(np.array_equal, *both))
    for made in (stayed, resumed):
        made.step()
    both = [values((made.params, made.gradients, made.moments)) for made in (stayed, resumed)]
    assert all(map(np.array_equal, *both))
    for made in (stayed, resumed):
        made.drop()


def test_a_checkpoint_with_other_arrays_or_with_a_lost_file_is_refused(four_devices, tmp_path):
    from kvpipe.trainer import checkpoint

    made, _, given = trainer(TrainerConfig())
    made.start(given)
    made.offload()
    checkpoint.save(context(tmp_path, made), 1)
    for other in (
        trainer(TrainerConfig(dtype="bfloat16"))[0],
        trainer(TrainerConfig(), 1, 4)[0],
    ):
        with pytest.raises(InputError, match=r"cycle-1 has .* where this model, its precision and"):
            checkpoint.resume(other, context(tmp_path, resume_after=1))
    with pytest.raises(InputError, match="cycle-1 has 5 arrays of trainer_moments, and"):
        checkpoint.resume(
            trainer(TrainerConfig(warmup_steps=2))[0], context(tmp_path, resume_after=1)
        )
    for data in tmp_path.rglob("d/*"):  # which of them orbax reads depends on its threads
        data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(InputError, match="cycle-1 is not whole: "):
        checkpoint.resume(trainer(TrainerConfig())[0], context(tmp_path, resume_after=1))
    made.drop()
