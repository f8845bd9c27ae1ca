"""Find the model's directory: given, generated, or from the Hugging Face cache or hub."""

import json
import os
import tempfile
from pathlib import Path

from kvpipe.checkpoints import INDEX_NAME
from kvpipe.checkpoints.json_object import read_object
from kvpipe.checkpoints.model_check import Needs, check_config, check_directory
from kvpipe.checkpoints.model_config import Model
from kvpipe.checkpoints.tiny_config import config_json
from kvpipe.config.schema import Kvpipe, ModelConfig, TinyModel
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


def key_of(model: ModelConfig) -> str:
    """Return the config key that says where the model comes from."""
    if model.path is not None:
        return "model.path"
    return "model.generate" if model.generate is not None else "model.id"


def known_directory(config: Kvpipe) -> Path | None:
    """Return the model's directory if it is on this machine and kvpipe does not generate it."""
    key = key_of(config.model)
    if key == "model.path":
        return Path(str(config.model.path)).absolute()
    return snapshot(config) if key == "model.id" else None


def check_known(config: Kvpipe, needs: Needs, whole: bool) -> Model | None:
    """Return the model, if its config.json is on this machine.

    With ``whole`` the directory ``model.path`` must have all that is needed; else, as in the hub's
    cache, only what is there is checked.

    Raises:
        InputError: naming everything that is wrong with it.
    """
    check_model(config)
    model, key, directory = config.model, key_of(config.model), known_directory(config)
    if directory is not None:
        if key == "model.id" or not whole:
            needs = _there(directory, needs)
        return check_directory(key, directory, needs)
    if model.generate is not None:
        return Model(model.generate.architecture, config_json(model.generate))
    file = _config_file(model)
    return None if file is None else check_config("model.config", file, str(file))


def snapshot(config: Kvpipe) -> Path | None:
    """Return the model's directory in the hub's cache, complete or not; None if it is not there."""
    from huggingface_hub import constants

    model = config.model
    cache = Path(config.engine.download_dir or constants.HF_HUB_CACHE).expanduser()
    repository = cache / f"models--{model.id.replace('/', '--')}"
    revision = model.revision or constants.DEFAULT_REVISION
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    directory = repository / "snapshots" / commit
    return directory if (directory / "config.json").is_file() else None


def _there(directory: Path, needs: Needs) -> Needs:
    """Return those of the needs that are in a directory, which may be incomplete."""
    weights = any(directory.glob("*.safetensors")) and not _lacks_files(directory / INDEX_NAME)
    tokenizer = (directory / "tokenizer.json").is_file()
    return Needs(weights=needs.weights and weights, tokenizer=needs.tokenizer and tokenizer)


def _lacks_files(index: Path) -> bool:
    """Whether an index names files that are not there."""
    try:
        files = read_object(index).get("weight_map")
    except InputError:
        return False
    names = files.values() if isinstance(files, dict) else ()
    return not all((index.parent / str(name)).is_file() for name in names)


def check_shape(config: Kvpipe) -> None:
    """Refuse a model whose shape is not known without the hub.

    Raises:
        InputError: none of ``model.path``, ``model.generate`` and ``model.config`` gives it,
            ``model.config`` is no file, or it is the config of another model than ``model.id``.
    """
    check_model(config)
    model = config.model
    if key_of(model) == "model.id" and _config_file(model) is None:
        raise InputError(
            f"model.config: a plan needs the shape of {model.id!r} and never asks the hub; give "
            "the path of its config.json, or a name of conf/model/configs "
            f"({', '.join(_shipped())}), or set model.path"
        )


def shape_dir(config: Kvpipe, scratch: Path) -> Path:
    """Return a directory that contains at least the model's config.json, if need be in ``scratch``.

    The config is one that :func:`check_shape` accepts.
    """
    model = config.model
    if model.path is not None:
        return Path(model.path).absolute()
    if model.generate is not None:
        text = json.dumps(config_json(model.generate))
    else:
        file = _config_file(model)
        assert file is not None, "check_shape accepts no model without one"
        text = file.read_text(encoding="utf-8")
    directory = Path(tempfile.mkdtemp(dir=scratch))
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


def _config_file(model: ModelConfig) -> Path | None:
    """Return the config.json of a model that has no directory here, if it is known.

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
        return _CONFIGS / name
    if model.config is None:
        return None
    if Path(name).is_file():
        return Path(name)
    raise InputError(
        f"model.config: there is no {name!r} in conf/model/configs, and no file of this path; "
        f"{nearest(name, shipped)}"
    )


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
