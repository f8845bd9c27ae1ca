"""Find the directory of the model: given, generated, or from the Hugging Face cache or hub."""

import os
from dataclasses import asdict
from pathlib import Path

from kvpipe.checkpoints import tiny
from kvpipe.errors import InputError
from kvpipe.schema import Kvpipe


def cache_dir(config: Kvpipe) -> Path:
    """Return where generated checkpoints are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvpipe"


def check_model(config: Kvpipe) -> None:
    """Refuse a model that cannot be found, before anything is started.

    Raises:
        InputError: ``model.path`` is not a model directory, or contradicts ``model.generate``.
    """
    model = config.model
    if model.path is None:
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
        return tiny.ensure(tiny.TinyModel(**asdict(model.generate)), cache_dir(config))
    return _from_hub(config)


def _from_hub(config: Kvpipe) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                config.model.id,
                revision=config.model.revision,
                cache_dir=config.engine.download_dir,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model.id: cannot get {config.model.id!r} from the Hugging Face hub ({error}); "
            "set model.path to a directory that has it"
        ) from error
