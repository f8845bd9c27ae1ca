"""Gather the facts that the adapter relies on from the installed sglang-jax.

``python -m tools.upstream_watch.facts FILE`` writes them as JSON. It is a separate program, since
an engine that does not work with this version can take down its process.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.upstream_watch.exercise import CONFIG, DEVICES, steps

PACKAGES = ("sglang-jax", "jax", "flax")
MODELS = ("tiny_float32", "qwen3_float32", "llama_float32")

Section = dict[str, str]


def gather() -> dict[str, Any]:
    """Return every section by name; one that cannot be gathered has the reason under ``failed``."""
    from kvpipe.checkpoints.tiny import ensure
    from kvpipe.system.versions import version_of
    from tests.golden.answers import spec
    from tools.upstream_watch import patches

    found: dict[str, Any] = {"versions": {name: version_of(name) for name in PACKAGES}}
    with tempfile.TemporaryDirectory() as scratch:
        dirs = {name: ensure(spec(name), Path(scratch)) for name in MODELS}
        tiny = dirs[MODELS[0]]
        # Before any patch is applied in this process, so that the signatures are upstream's.
        found["imported names"] = _or_why(_imported_names)
        found["compat patches"] = _or_why(lambda: patches.needed(tiny))
        for name, model_dir in dirs.items():
            model = name.removesuffix("_float32")
            found |= _model_facts(model, model_dir)
        found["server arguments"] = _or_why(lambda: _server_arguments(tiny))
        found["steps"], found["touched attributes"] = _observed(tiny)
    return found


def _or_why(gathered: Callable[[], Section]) -> Section:
    """Return the section, or why it cannot be gathered, which the watch then reports."""
    try:
        return gathered()
    except Exception as error:
        traceback.print_exc()
        return {"failed": _one_line(error)}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _model_facts(model: str, model_dir: Path) -> dict[str, Section]:
    """Return a model's parameters, KV buffers and weight mappings, without allocating anything."""
    from kvpipe.engine import compat, memory, shapes
    from kvpipe.engine.weight_map import weight_mappings

    names = [f"{model}: {what}" for what in ("parameters", "KV cache", "weight mappings")]
    try:
        mesh = compat.device_mesh(DEVICES)
        config = dataclasses.replace(CONFIG, dtype="bfloat16")
        found = shapes.of_mesh(config, model_dir, mesh, "cpu")
        buffers = found.runner.token_to_kv_pool.kv_buffer
    except Exception as error:
        traceback.print_exc()
        return {name: {"failed": _one_line(error)} for name in names}
    sums = {
        "bytes of the parameters": memory.bytes_of(found.params.values()),
        "bytes of the KV cache": memory.bytes_of(buffers),
    }
    return {
        names[0]: _by_layer((path, _leaf(leaf)) for path, leaf in found.params.items())
        | {"sum": f"{sums['bytes of the parameters'][0]} bytes a device"},
        names[1]: _by_layer((f"layers.{i}", _leaf(b)) for i, b in enumerate(buffers))
        | {"sum": f"{sums['bytes of the KV cache'][0]} bytes a device"},
        names[2]: _by_layer(
            (name, _mapping(mapping))
            for name, mapping in weight_mappings(found.runner.model).items()
        ),
    }


def _leaf(leaf: Any) -> str:
    spec = tuple(leaf.sharding.spec)
    return f"{leaf.dtype}{list(leaf.shape)} sharded {spec}"


def _mapping(mapping: Any) -> str:
    """Return a WeightMapping without its default values."""
    fields = dataclasses.fields(mapping)
    values = {field.name: getattr(mapping, field.name) for field in fields}
    shown = {
        field.name: values[field.name]
        for field in fields
        if field.name in ("target_path", "sharding") or values[field.name] != field.default
    }
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _by_layer(pairs: Iterable[tuple[str, str]]) -> Section:
    """Return the facts with one entry for all layers; where layers differ, show both."""
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        key, value = (re.sub(r"layers\.\d+", "layers.*", text) for text in (name, value))
        values = found.setdefault(key, [])
        if value not in values:
            values.append(value)
    return {key: " | ".join(values) for key, values in found.items()}


def _imported_names() -> Section:
    from kvpipe.engine import compat
    from tools.upstream_watch.touched import imported_names

    with compat.pytree_registered_twice():
        return imported_names()


def _server_arguments(model_dir: Path) -> Section:
    """Return the adapter's arguments, under the installed ServerArgs's names."""
    from sgl_jax.srt.server_args import ServerArgs

    from kvpipe.engine.sglang import server_arguments
    from tools.upstream_watch.touched import ABSENT

    fields = {field.name: field for field in dataclasses.fields(ServerArgs)}
    given = server_arguments(CONFIG, model_dir, ServerArgs)
    return {name: _default(fields[name]) if name in fields else ABSENT for name in sorted(given)}


def _default(field: dataclasses.Field[Any]) -> str:
    required = field.default is dataclasses.MISSING
    return "required" if required else f"default {field.default!r}"


def _observed(model_dir: Path) -> tuple[Section, Section]:
    """Return the result of each step of the adapter, and the attributes that it touched."""
    from tools.upstream_watch.touched import Observer

    observer, went = Observer(), dict[str, str]()
    try:
        from sgl_jax.srt.entrypoints.engine import Engine
        from sgl_jax.srt.managers.scheduler import Scheduler
        from sgl_jax.srt.managers.tp_worker import ModelWorker
    except Exception as error:
        traceback.print_exc()
        return {"import": _one_line(error)}, {}
    with observer.watching(Engine, Scheduler, ModelWorker):
        for name, step in steps(model_dir):
            try:
                step()
            except Exception as error:
                traceback.print_exc()
                went[name] = _one_line(error)
                break
            went[name] = "works"
    return went, observer.seen


def main() -> None:
    """Write the facts of the installed version to the file named on the command line."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    Path(sys.argv[1]).write_text(json.dumps(gather(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine left alive by a failed step would block the exit


if __name__ == "__main__":
    main()
