"""Find the model's directory: given, generated, or from the Hugging Face cache or hub."""

import json
import os
import tempfile
from pathlib import Path

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError, RecordError
from kvpipe.suggest import nearest
from kvpipe.system.places import CONF

_CONFIGS = CONF / "model" / "configs"


def cache_dir(config: Kvpipe) -> Path:
    """Return the directory of generated checkpoints.

    Raises:
        InputError: it begins with ``~``, and there is no such home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    given = config.cache_dir if config.cache_dir is not None else f"{base}/kvpipe"
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise InputError(f"cache_dir: {given}: there is no such home directory") from None


def check_cache_dir(config: Kvpipe) -> None:
    """Refuse a cache in which nothing can be written, unless the generated model is there.

    Raises:
        InputError: it cannot be written in.
    """
    directory = cache_dir(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and _has_model(config, directory):
            return
        reason = getattr(error, "strerror", error)
        raise InputError(
            f"cache_dir: cannot write in {directory}: {reason}; set cache_dir to a directory that "
            "can be written"
        ) from None


def _has_model(config: Kvpipe, directory: Path) -> bool:
    from kvpipe.checkpoints import tiny

    spec = config.model.generate
    return spec is not None and os.access(tiny.directory_of(spec, directory), os.R_OK | os.X_OK)


def check_model(config: Kvpipe) -> None:
    """Refuse a model that cannot be found, before anything is started.

    Raises:
        InputError: ``model.path`` is not a model directory or contradicts ``model.generate``.
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
    """Return the directory of the model, generating or downloading it if necessary.

    Raises:
        InputError: it is not there, or the hub cannot be reached.
        RecordError: the generated model cannot be written, e.g. because the disk is full.
    """
    check_model(config)
    model = config.model
    if model.path is not None:
        return Path(model.path).absolute()
    if model.generate is not None:
        from kvpipe.checkpoints import tiny

        directory = cache_dir(config)
        try:
            return tiny.ensure(model.generate, directory)
        except OSError as error:
            message = f"cache_dir: cannot write a model in {directory}: {error.strerror}"
            raise RecordError(message) from error
    return _from_hub(config)


def check_shape(config: Kvpipe) -> None:
    """Refuse a model whose shape is not known without the hub.

    Raises:
        InputError: none of ``model.path``, ``model.generate`` and ``model.config`` gives it, or
            ``model.config`` names no file that ships with kvpipe.
    """
    check_model(config)
    model = config.model
    if model.path is not None or model.generate is not None:
        return
    if model.config is None:
        raise InputError(
            f"model.config: a plan needs the shape of {model.id!r} and never asks the hub; name a "
            f"file of conf/model/configs ({', '.join(_shipped())}) or set model.path"
        )
    if model.config not in _shipped():
        raise InputError(
            f"model.config: there is no {model.config!r} in conf/model/configs; "
            f"{nearest(model.config, _shipped())}"
        )


def shape_dir(config: Kvpipe, scratch: Path) -> Path:
    """Return a directory that contains at least the model's config.json.

    Args:
        config: as :func:`check_shape` accepts it.
        scratch: directory to write to, for a model that has no directory.
    """
    model = config.model
    if model.path is not None:
        return Path(model.path).absolute()
    if model.generate is not None:
        from kvpipe.checkpoints import tiny

        text = json.dumps(tiny.config_json(model.generate))
    else:
        text = (_CONFIGS / str(model.config)).read_text(encoding="utf-8")
    directory = Path(tempfile.mkdtemp(dir=scratch))
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


def _shipped() -> list[str]:
    return sorted(file.name for file in _CONFIGS.iterdir())


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
