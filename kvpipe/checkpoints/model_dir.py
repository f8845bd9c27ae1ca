"""Find the model's directory: given, generated, or from the Hugging Face cache or hub."""

import json
import os
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from kvpipe.config.schema import Kvpipe, ModelConfig, TinyModel
from kvpipe.errors import InputError
from kvpipe.suggest import nearest


def cache_dir(config: Kvpipe) -> Path:
    """Return the directory of generated checkpoints."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvpipe"


def check_model(config: Kvpipe) -> None:
    """Refuse a model that cannot be found, before anything is started.

    Raises:
        InputError: ``model.path`` is not a model directory or contradicts ``model.generate``.
    """
    model = config.model
    if model.path is None:
        return
    if model.generate not in (None, TinyModel()):
        raise InputError(
            "model: give one of model.path and a shape for model.generate, and not both; "
            "model.path needs no model.generate=null"
        )
    path = Path(model.path)
    if not path.is_dir():
        raise InputError(f"model.path: {path.absolute()} is not a directory")
    if not (path / "config.json").is_file():
        raise InputError(f"model.path: {path.absolute()} has no config.json")


def find_model(config: Kvpipe) -> Path:
    """Return the directory of the model, generating or downloading it if necessary.

    Raises:
        InputError: it is not there, or the hub cannot be reached.
    """
    check_model(config)
    model = config.model
    if model.path is not None:
        return Path(model.path).absolute()
    if model.generate is not None:
        from kvpipe.checkpoints import tiny

        return tiny.ensure(model.generate, cache_dir(config))
    return _from_hub(config)


def check_shape(config: Kvpipe) -> None:
    """Refuse a model whose shape is not known without the hub.

    Raises:
        InputError: none of ``model.path``, ``model.generate`` and ``model.config`` gives it,
            ``model.config`` is no file, or it is the config of another model than ``model.id``.
    """
    check_model(config)
    if config.model.path is None and config.model.generate is None:
        _config_file(config.model)


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
        text = _config_file(model).read_text(encoding="utf-8")
    directory = Path(tempfile.mkdtemp(dir=scratch))
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


def _config_file(model: ModelConfig) -> Traversable:
    """Return the config.json of a model that has no directory here.

    The config follows ``model.id``: a name that an experiment gave would stay when only the id is
    overridden, and the plan would be another model's.
    """
    own, shipped = f"{model.id.rpartition('/')[2].lower()}.json", _shipped()
    name = model.config or own
    if name in shipped:
        if name != own and own in shipped:
            raise InputError(
                f"model.config is {name!r}, but the config of {model.id!r} is {own!r}; leave "
                "model.config out"
            )
        return _configs() / name
    if model.config is None:
        raise InputError(
            f"model.config: a plan needs the shape of {model.id!r} and never asks the hub; give "
            f"the path of its config.json, or a name of conf/model/configs ({', '.join(shipped)}), "
            "or set model.path"
        )
    if Path(name).is_file():
        return Path(name)
    raise InputError(
        f"model.config: there is no {name!r} in conf/model/configs, and no file of this path; "
        f"{nearest(name, shipped)}"
    )


def _configs() -> Traversable:
    return resources.files("conf") / "model" / "configs"


def _shipped() -> list[str]:
    return sorted(file.name for file in _configs().iterdir())


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
