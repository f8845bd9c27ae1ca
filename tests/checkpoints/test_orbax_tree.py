"""A tree that orbax saved comes back to the host as it was, dtype and all."""

import numpy as np
import pytest

from kvpipe.checkpoints.mllm import hf_weights, tree_from_checkpoint
from kvpipe.checkpoints.orbax_tree import read_tree
from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.errors import InputError


def test_the_saved_tree_holds_the_tensors_of_the_files_it_was_made_of(tmp_path, four_devices):
    import jax
    from orbax import checkpoint

    files = open_checkpoint(ensure(TinyModel(num_hidden_layers=1), tmp_path))
    checkpoint.PyTreeCheckpointer().save(tmp_path / "saved", tree_from_checkpoint(files))
    alive = len(jax.live_arrays())
    read = hf_weights(read_tree(tmp_path / "saved"))
    assert len(jax.live_arrays()) == alive
    assert read.keys() == files.keys()
    for name, array in read.items():
        assert array.dtype == files[name].dtype, name
        assert np.array_equal(array, files[name]), name


def test_a_directory_without_an_orbax_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not an orbax checkpoint"):
        read_tree(tmp_path)
