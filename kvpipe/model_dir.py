"""Find the directory of the model: given, generated, or from the Hugging Face cache or hub."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvpipe.errors import InputError
from kvpipe.schema import Kvpipe, TinyModelConfig

if TYPE_CHECKING:
    from kvpipe.checkpoints.tiny import TinyModel


def cache_dir(config: Kvpipe) -> Path:
    """Return where generated checkpoints are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvpipe"


def check_model(config: Kvpipe) -> None:
    """Refuse a model that cannot be found, before anything is started.

    Raises:
        InputError: ``model.path`` is not a model directory or contradicts ``model.generate``, or
            ``model.generate`` is a shape that no model can have.
    """
    model = config.model
    if model.path is None:
        # The default shape is known to be right; to check another one numpy has to be imported.
        if model.generate is not None and model.generate != TinyModelConfig():
            _tiny_model(model.generate)
        return
    if model.generate is not None:
        raise InputError("model: give one of model.path and model.generate, and not both")
    path = Path(model.path)
    if not path.is_dir():
        raise InputError(f"model.path: {path.absolute()} is not a directory")
    if not (path / "config.json").is_file():
        raise InputError(f"model.path: {path.absolute()} has no config.json")


def find_model(config: Kvpipe) -> Path:
    """Return the directory of the model, after generating or downloading it if need be.

    Raises:
        InputError: it is not there, or the hub cannot be reached.
    """
    check_model(config)
    model = config.model
    if model.path is not None:
        return Path(model.path).absolute()
    if model.generate is not None:
        from kvpipe.checkpoints import tiny

        return tiny.ensure(_tiny_model(model.generate), cache_dir(config))
    return _from_hub(config)


def _tiny_model(shape: TinyModelConfig) -> "TinyModel":
    from kvpipe.checkpoints.tiny import TinyModel

    return TinyModel(**asdict(shape))


def _from_hub(config: Kvpipe) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                config.model.id,
                revision=config.model.revision,
                cache_dir=config.engine.download_dir,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model.id: cannot get {config.model.id!r} from the Hugging Face hub ({error}); "
            "set model.path to a directory that has it"
        ) from error
