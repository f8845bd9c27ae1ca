"""Find everything that is wrong with the files of a model's directory: one error, without jax.

Headers and configs are read, values are not: a value that is not finite is found at the swap.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from kvpipe.checkpoints import model_config, tokenizer
from kvpipe.checkpoints.json_object import read_object
from kvpipe.checkpoints.model_config import Model
from kvpipe.checkpoints.tensor_names import EMBEDDING, HEAD, computed, differences, misshapen
from kvpipe.errors import InputError

_CONFIG = "config.json"
# Files that the engine reads if they are there.
_OTHER_CONFIGS = ("generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Needs:
    """The files that a pipeline needs in a model's directory beside config.json.

    It needs the ``weights`` if a step reads the checkpoint, the ``tokenizer`` if one starts the
    engine.
    """

    weights: bool = False
    tokenizer: bool = False


def check_config(key: str, file: Traversable, where: str) -> Model:
    """Return the model of a config.json; messages name the config key, and call the file ``where``.

    Raises:
        InputError: naming everything that is wrong with it.
    """
    try:
        config = read_object(file, where)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if faults := model_config.find_faults(config):
        raise InputError(f"{key}: {where}: {'; '.join(faults)}")
    return Model(model_config.architecture_of(config), config)


def check_directory(key: str, directory: Path, needs: Needs) -> Model:
    """Return the model in a directory; messages name the config key that chose it.

    Raises:
        InputError: naming everything that is wrong with it.
    """
    faults: list[str] = []
    model = None
    try:
        model = check_config(key, directory / _CONFIG, _CONFIG)
    except InputError as error:
        faults.append(str(error).removeprefix(f"{key}: "))
    faults += _other_faults(directory)
    if needs.tokenizer:
        faults += tokenizer.find_faults(directory, model and model.vocab_size)
    if needs.weights:
        faults += _weight_faults(directory, model)
    if model is None or faults:
        raise InputError(f"{key}: {directory}: {'; '.join(faults)}")
    return model


def _other_faults(directory: Path) -> Iterator[str]:
    for name in _OTHER_CONFIGS:
        if (file := directory / name).is_file():
            try:
                read_object(file, name)
            except InputError as error:
                yield str(error)


def _weight_faults(directory: Path, model: Model | None) -> list[str]:
    # It imports numpy, which a check without a checkpoint does not need.
    from kvpipe.checkpoints.safetensors import open_checkpoint

    try:
        given = open_checkpoint(directory)
    except InputError as error:
        return [str(error)]
    if model is None or (needed := model.tensors) is None:
        return []
    wrong = [misshapen(name, needed[name], given[name]) for name in needed if name in given]
    spare = computed(given)
    # The values are compared at the swap.
    if model.tied and HEAD in given and given[HEAD].shape == needed[EMBEDDING]:
        spare.add(HEAD)
    return differences(needed, given, [text for text in wrong if text], spare)
