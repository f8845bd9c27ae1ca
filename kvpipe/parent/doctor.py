"""Report the state of this machine, and whether the chosen experiment could run on it.

The parent inspects everything that needs no jax; a child (:mod:`kvpipe.worker.doctor_probe`) looks for the
devices.
"""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from kvpipe.checkpoints.model_dir import check_shape, known_directory, shape_dir, snapshot
from kvpipe.config.jax_environment import jax_environment
from kvpipe.config.schema import Kvpipe, RunnerConfig, TrackingMode
from kvpipe.errors import InputError, KvpipeError, TimedOut
from kvpipe.parent.child_process import Child, start_child
from kvpipe.parent.limits import Limits
from kvpipe.pipeline import facts
from kvpipe.plan.fold import PlannedStep
from kvpipe.plan.inputs import check_inputs
from kvpipe.system.libtpu_lock import LOCK_FILE, holder
from kvpipe.system.process_memory import host_memory_bytes
from kvpipe.system.secrets import API_KEY, wandb_api_key, without_key
from kvpipe.system.versions import version_of
from kvpipe.units import sized

_PACKAGES = ("sglang-jax", "jax", "jaxlib", "flax", "libtpu", "transformers", "wandb", "hydra-core")
_DEVICES_S = 180.0
_SHUTDOWN_S = 10.0
_SERVER_S = 5.0
_LITTLE_DISK = 1 << 30
_NO_DISK = 1 << 24
_LITTLE_RAM = 2 << 30


class Level(StrEnum):
    """Level of a finding; ``bad`` means that the experiment cannot run."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True)
class Finding:
    """One line of the report: a part of the machine, its state, and a remedy, which may be empty."""

    level: Level
    about: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        line = f"{self.level:4}  {self.about:12}  {self.found}"
        return f"{line}; {self.todo}" if self.todo else line


def examine(
    config: Kvpipe,
    plain: Mapping[str, Any],
    planned: Sequence[PlannedStep],
    find_server: Callable[[float], str],
) -> Iterator[Finding]:
    """Yield the findings about an experiment's config, typed and plain, and its steps.

    ``find_server`` contacts W&B's server within some seconds and returns its address.
    """
    yield from _versions()
    yield _disk()
    yield from _wandb(config, planned, find_server)
    yield _model(config, planned)
    yield from _hugging_face(config)
    lock = _libtpu_lock(config.engine.device)
    yield lock
    if lock.level is not Level.BAD:
        yield from _devices(config, plain)
    yield _ram()


def _versions() -> Iterator[Finding]:
    python = f"Python {platform.python_version()}"
    installed = [f"kvpipe {importlib.metadata.version('kvpipe')}", python]
    missing = []
    for package in _PACKAGES:
        try:
            installed.append(f"{package} {version_of(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    yield Finding(Level.OK, "versions", ", ".join(installed))
    if missing:
        yield Finding(
            Level.BAD, "versions", f"not installed: {', '.join(missing)}", "run: make env"
        )


def _disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{sized(free)} free in {here}"
    if free < _NO_DISK or not os.access(here, os.W_OK):
        return Finding(
            Level.BAD, "disk", found, "a run writes here; change to a directory that can be written"
        )
    if free < _LITTLE_DISK:
        return Finding(Level.WARN, "disk", found, "make room for logs, W&B's files and checkpoints")
    return Finding(Level.OK, "disk", found)


def _ram() -> Finding:
    total = host_memory_bytes()
    free = min(psutil.virtual_memory().available, total)
    found = f"{sized(free)} of {sized(total)} free"
    if free < _LITTLE_RAM:
        return Finding(Level.WARN, "host memory", found, "end other processes that use it")
    return Finding(Level.OK, "host memory", found)


def _libtpu_lock(device: str) -> Finding:
    held = holder()
    if held is not None:
        found = f"process {held.pid} of {held.user} has the TPU: {held.command}"
        level = Level.BAD if device == "tpu" else Level.OK
        return Finding(level, "libtpu lock", found, "wait for it, or end it" * (device == "tpu"))
    if device == "tpu" and LOCK_FILE.exists() and not os.access(LOCK_FILE, os.W_OK):
        found = f"{LOCK_FILE} belongs to another user, although nothing holds it"
        return Finding(Level.BAD, "libtpu lock", found, f"run: sudo rm {LOCK_FILE}")
    return Finding(Level.OK, "libtpu lock", "nothing holds it")


def _wandb(
    config: Kvpipe, planned: Sequence[PlannedStep], find_server: Callable[[float], str]
) -> Iterator[Finding]:
    """Check W&B for the configured mode, without showing the key."""
    mode = config.tracking.mode
    used = any(facts.WANDB in item.effect.adds for item in planned)
    needed = used and mode is TrackingMode.online
    short = Level.WARN if config.tracking.fallback_offline else Level.BAD
    try:
        key = wandb_api_key(Path.cwd(), os.environ)
    except InputError as error:
        yield Finding(short if needed else Level.WARN, "W&B", str(error))
        return
    where = "the environment" if os.environ.get(API_KEY, "").strip() else ".env"
    state = f"{mode.value}, {f'an API key in {where}' if key else 'no API key'}"
    if not needed:
        yield Finding(Level.OK, "W&B", state if used else f"{state}; the pipeline does not use it")
        return
    if not key:
        todo = f"set {API_KEY} in the environment or in a .env with mode 600, or tracking=offline"
        yield Finding(short, "W&B", state, todo)
        return
    try:
        yield Finding(Level.OK, "W&B", f"{state}, {find_server(_SERVER_S)} is reached")
    except (OSError, KvpipeError) as error:
        yield Finding(short, "W&B", f"{state}, no server: {error}", "or tracking=offline")


def _model(config: Kvpipe, planned: Sequence[PlannedStep]) -> Finding:
    """Check the model's files that are here, and the request against its context."""
    try:
        check_inputs(config, planned)
    except InputError as error:
        return Finding(Level.BAD, "model", str(error))
    here = known_directory(config)
    return Finding(Level.OK, "model", f"{config.model.id}, {here}" if here else config.model.id)


def _hugging_face(config: Kvpipe) -> Iterator[Finding]:
    """Check the source of the model and the presence of a token, without showing the token."""
    import huggingface_hub
    from huggingface_hub import constants

    cache = config.engine.download_dir or constants.HF_HUB_CACHE
    token = "a token" if huggingface_hub.get_token() else "no token"
    state = f"cache {cache}, {token}"
    model = config.model
    if model.path is not None or model.generate is not None:
        yield Finding(Level.OK, "Hugging Face", f"{state}; the model does not come from it")
        return
    known = snapshot(config)
    if known is not None and list(known.glob("*.safetensors")):
        yield Finding(Level.OK, "Hugging Face", f"{state}; {model.id} is in the cache")
    elif constants.HF_HUB_OFFLINE:
        found = f"{state}; {model.id} is not in the cache, and HF_HUB_OFFLINE is set"
        yield Finding(Level.BAD, "Hugging Face", found, "unset it, or set model.path")
    else:
        found = f"{state}; {model.id} is not in the cache"
        todo = "the run will download it; a gated model needs HF_TOKEN"
        yield Finding(Level.WARN, "Hugging Face", found, todo)


def _devices(config: Kvpipe, plain: Mapping[str, Any]) -> Iterator[Finding]:
    """Ask a child process for jax's devices, and plan the experiment for them."""
    with tempfile.TemporaryDirectory(prefix="kvpipe-doctor-") as directory:
        scratch = Path(directory)
        environ = without_key(os.environ) | jax_environment(config.engine, os.environ)
        try:
            check_shape(config)
            model_dir = str(shape_dir(config, scratch))
        except InputError as error:
            model_dir = None
            yield Finding(Level.WARN, "plan", str(error))
        module, log = "kvpipe.worker.doctor_probe", scratch / "probe.log"
        with start_child(module, log, environ, _SHUTDOWN_S) as child:
            child.send({"config": dict(plain), "model_dir": model_dir})
            yield from _findings_of(_answer(child), config)


def _answer(child: Child) -> dict[str, Any]:
    limits = Limits(RunnerConfig(run_timeout_s=_DEVICES_S))
    try:
        answer = next(child.messages(limits.wait), None)
    except TimedOut:
        return {"error": f"jax has not found the devices within {_DEVICES_S:g} s"}
    if answer is None:
        return {"error": f"the probe ended by {child.how_it_ended()}: {child.log_tail()}"}
    return answer


def _findings_of(answer: Mapping[str, Any], config: Kvpipe) -> Iterator[Finding]:
    if "error" in answer:
        todo = "look at engine.device, engine.tp_size and the installed jax"
        yield Finding(Level.BAD, "devices", " ".join(answer["error"].split()), todo)
        return
    devices, hbm = answer["devices"], answer["hbm_bytes"]
    found = (
        f"{devices['device_count']} × {devices['device_kind']} ({devices['platform']}), "
        f"{sized(hbm)} each"
    )
    yield Finding(Level.OK, "devices", found)
    yield Finding(Level.OK, "patches", ", ".join(answer["patches"]))
    if answer["why_not_fit"]:
        yield Finding(Level.BAD, "plan", answer["why_not_fit"])
    elif answer["peak_bytes"] is not None:
        peak = f"peak {sized(answer['peak_bytes'])} of {sized(hbm)} a device"
        level = Level.WARN if answer["warning"] else Level.OK
        yield Finding(level, "plan", f"{config.experiment} fits, {peak}", answer["warning"] or "")
