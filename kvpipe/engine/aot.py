"""Compile the engine's steps and kvpipe's own programs ahead of time, for a TPU without one.

The engine's own worker is built with abstract weights and KV cache (:mod:`.shapes`), so the limits,
paddings, batches and jitted step are the ones that a run uses. ``jax.experimental.topologies``
describes the TPU and libtpu compiles for it.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import compat, digests, kv_cache, weight_proof
from kvpipe.engine.params import closure
from kvpipe.engine.program_cache import cached
from kvpipe.engine.shapes import of_mesh, sharded_leaves
from kvpipe.errors import InputError, KvpipeError
from kvpipe.pipeline.ledger import KV_PUT, KV_TAKE, WEIGHT_DIGEST
from kvpipe.plan.targets import CPU
from kvpipe.records.run import Program

# A program with several outputs has a table of them as well: 8 bytes each, in a tile on a TPU.
_OUTPUT_TABLE_BYTES = 8192
_MEGACORE = ("v4", "v5p")
# Let libtpu describe a topology without querying the metadata of the machine it would run on.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Nothing runs on a TPU here, so do not take libtpu's lock from a process that uses one.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class CompileFinding(KvpipeError):
    """A step does not compile for the target; the message says what would help."""


@dataclass(frozen=True)
class Place:
    """A target to compile for, with the cache of compiled programs.

    Attributes:
        config: how the engine will be started.
        model_dir: directory with the model's config.json.
        target: ``cpu``, or chip and topology, e.g. ``v4:2x2x1``; this process needs as many virtual
            CPU devices.
        cache_dir: kvpipe's cache.
        compiles: whether what is not in the cache is compiled; else it is left out.
    """

    config: EngineConfig
    model_dir: Path
    target: str
    cache_dir: Path
    compiles: bool

    @property
    def mesh(self) -> Mesh:
        """The mesh that the engine would build from the target's devices."""
        devices = jax.devices() if self.target == CPU else _devices(self.target)
        return compat.device_mesh(
            self.config.tp_size or len(devices) // self.config.dp_size, devices
        )

    @property
    def platform(self) -> str:
        """The target's platform, by which the engine chooses its attention backend."""
        return CPU if self.target == CPU else "tpu"

    def cached(
        self, content: Mapping[str, Any], make: Callable[[], tuple[Program, ...]]
    ) -> tuple[Program, ...]:
        """Return what ``make`` compiles for the target, from the cache if present.

        Args:
            content: inputs of the programs beside model, target and versions.
            make: compiles them; an exception from it is not cached.
        """
        key = {**content, "target": self.target}
        return cached(key, self.model_dir, self.cache_dir, make if self.compiles else None) or ()


def engine_steps(place: Place, prompt_tokens: int) -> tuple[Program, ...]:
    """Return the prefill of one prompt and the decode of one request, compiled for a target.

    Args:
        place: the target.
        prompt_tokens: length of the prompt; the engine pads it to one of its paddings.

    Raises:
        CompileFinding: a step does not compile for the target.
    """
    content = {"engine": _engine(place.config), "prompt_tokens": prompt_tokens}
    return place.cached(content, lambda: compile_steps(place, prompt_tokens))


def kv_programs(place: Place, names: Sequence[str]) -> tuple[Program, ...]:
    """Return kvpipe's own programs on the engine's KV cache, compiled for a target.

    Args:
        place: the target.
        names: those that are wanted.

    Raises:
        CompileFinding: one does not compile, or copies the cache instead of writing into it.
    """
    if not names:
        return ()
    content = {"engine": _engine(place.config), "kv_programs": names}
    return place.cached(content, lambda: compile_kv_programs(place, names))


def digest_program(place: Place) -> tuple[Program, ...]:
    """Return the programs that sum the weights' digests, as one, compiled for a target."""
    content = {"engine": _engine(place.config), "weight_digests": True}
    return place.cached(content, lambda: (compile_digests(place),))


def _engine(config: EngineConfig) -> dict[str, Any]:
    """Return the part of the engine's config that its programs may depend on."""
    elsewhere = ("device", "virtual_devices", "node_rank", "dist_init_addr", "download_dir")
    return {key: value for key, value in asdict(config).items() if key not in elsewhere}


def compile_steps(place: Place, prompt_tokens: int) -> tuple[Program, ...]:
    """Compile what :func:`engine_steps` returns, without the cache."""
    mesh = place.mesh
    devices = list(mesh.devices.flat)
    compat.bit_width_of_dtypes()
    found = of_mesh(place.config, place.model_dir, mesh, place.platform)
    token_paddings, request_paddings, _ = found.worker.get_precompile_paddings()
    batches = [
        ("prefill", "EXTEND", request_paddings[-1], _padded(prompt_tokens, token_paddings)),
        ("decode", "DECODE", request_paddings[0], None),
    ]
    return tuple(
        _compile(found.worker, devices, name, mode, requests, tokens or requests)
        for name, mode, requests, tokens in batches
    )


def compile_kv_programs(place: Place, names: Sequence[str]) -> tuple[Program, ...]:
    """Compile what :func:`kv_programs` returns, without the cache."""
    found = of_mesh(place.config, place.model_dir, place.mesh, place.platform)
    lowered = kv_cache.lowered(found.runner.token_to_kv_pool.kv_buffer)
    return tuple(_kv_program(name, lowered[name], place.target) for name in names)


def compile_digests(place: Place) -> Program:
    """Compile what :func:`digest_program` returns, without the cache."""
    began = time.monotonic()
    found = of_mesh(place.config, place.model_dir, place.mesh, place.platform)
    rules = weight_proof.rules_of_model(found.runner, found.sources, found.params)
    used: list[Any] = [
        program.compile().memory_analysis() for program in digests.lowered(rules, found.params)
    ]
    return Program(
        name=WEIGHT_DIGEST,
        requests=0,
        tokens=0,
        code_bytes=sum(one.generated_code_size_in_bytes for one in used),
        temp_bytes=max(one.temp_size_in_bytes for one in used),
        compile_s=round(time.monotonic() - began, 3),
    )


def _kv_program(name: str, lowered: jax.stages.Lowered, target: str) -> Program:
    began = time.monotonic()
    used: Any = lowered.compile().memory_analysis()
    alias, arguments = used.alias_size_in_bytes, used.argument_size_in_bytes
    # The blocks on their way are there while it runs: those that it copies, or that it is given.
    blocks = {KV_TAKE: used.output_size_in_bytes, KV_PUT: arguments - alias}.get(name, 0)
    if name == KV_PUT and alias < used.output_size_in_bytes - _OUTPUT_TABLE_BYTES:
        raise not_in_place(name, alias, used.output_size_in_bytes, target)
    return Program(
        name=name,
        requests=0,
        tokens=0,
        code_bytes=used.generated_code_size_in_bytes,
        temp_bytes=used.temp_size_in_bytes + blocks,
        compile_s=round(time.monotonic() - began, 3),
        in_place_bytes=alias,
    )


def not_in_place(name: str, in_place_bytes: int, nbytes: int, target: str) -> CompileFinding:
    """Return the finding that a program of kvpipe copies arrays that it should update."""
    return CompileFinding(
        f"the program {name} is not in place on {target}: of {nbytes} bytes on a device it updates "
        f"{in_place_bytes} in place and copies the rest; report this, because the plan would be wrong"
    )


def described_device(target: str) -> Any:
    """Return a device of a TPU topology, by which its padding is known; None without libtpu."""
    return _devices(target)[0] if find_spec("libtpu") else None


def _devices(topology: str) -> list[Any]:
    if find_spec("libtpu") is None:
        raise InputError(
            "plan.compile: libtpu is not installed; it compiles for a TPU, and has wheels for Linux "
            "on x86-64"
        )
    os.environ.update(_NO_TPU_HERE)
    chip, _, shape = topology.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip in _MEGACORE else {}
    # A host has 2 x 2 chips, or fewer: libtpu refuses a topology that its hosts do not fill.
    x, y, _ = map(int, shape.split("x"))
    options["chips_per_host_bounds"] = (math.gcd(x, 2), math.gcd(y, 2), 1)
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(described.devices)


def _padded(tokens: int, paddings: list[int]) -> int:
    """Return the padding that the engine picks; longer prompts are prefilled in chunks."""
    return next((padding for padding in sorted(paddings) if padding >= tokens), max(paddings))


def _compile(
    worker: Any, devices: list[Any], name: str, mode: str, requests: int, tokens: int
) -> Program:
    began = time.monotonic()
    runner = worker.model_runner
    step, mesh = closure(runner.jitted_run_model), runner.mesh
    forward_batch, metadata = _batch(worker, mode, requests, tokens)
    state = nnx.split(runner.model)[1]
    try:
        with compat.kernel_sees(devices), jax.set_mesh(mesh):
            compiled = (
                step["jitted_run_model"]
                .lower(
                    step["model_def"],
                    step["model_state_def"],
                    sharded_leaves(state, mesh),
                    forward_batch,
                    # HEAD passes the KV cache together with its other pools.
                    getattr(runner, "memory_pools", runner.token_to_kv_pool),
                    metadata,
                )
                .compile()
            )
    except JaxRuntimeError as error:
        raise CompileFinding(_finding(name, requests, tokens, devices[0], error)) from error
    except NotImplementedError as error:
        raise CompileFinding(
            f"the engine's kernels do not support {devices[0].device_kind}: {error}"
        ) from error
    used: Any = compiled.memory_analysis()
    return Program(
        name=name,
        requests=requests,
        tokens=tokens,
        code_bytes=used.generated_code_size_in_bytes,
        temp_bytes=used.temp_size_in_bytes,
        compile_s=round(time.monotonic() - began, 3),
        in_place_bytes=used.alias_size_in_bytes,
    )


def _batch(worker: Any, mode: str, requests: int, tokens: int) -> tuple[Any, Any]:
    """Return the engine's batch and logits metadata for a step, as shapes on the target's mesh.

    The engine builds them on this machine's CPU devices; then the target's shardings are set.
    """
    from sgl_jax.srt.layers.logits_processor import LogitsMetadata
    from sgl_jax.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    runner, page_size = worker.model_runner, worker.page_size
    target = runner.mesh
    here = compat.device_mesh(target.shape["tensor"])
    cache_loc = -(-requests * worker.max_req_len // page_size) * page_size
    batch = _dummy_batch(worker, requests, tokens, ForwardMode[mode], cache_loc)
    backend = runner.attn_backend
    with ExitStack() as stack:
        for owner in (runner, backend):
            if hasattr(owner, "mesh"):  # the attention of a CPU has none
                stack.enter_context(compat.replaced(owner, "mesh", here))
        backend.forward_metadata = backend.get_forward_metadata(batch)
        made = (
            ForwardBatch.init_new(batch, runner),
            LogitsMetadata.from_model_worker_batch(batch, here),
        )

    def described(array: Any) -> Any:
        if not isinstance(array, jax.Array):  # a flag
            return array
        spec = getattr(array.sharding, "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(target, spec))

    return jax.tree.map(described, made)


def _dummy_batch(worker: Any, requests: int, tokens: int, mode: Any, cache_loc: int) -> Any:
    """Return the engine's own precompilation batch; in HEAD its compilation manager builds it."""
    if hasattr(worker, "generate_model_worker_batch"):
        return worker.generate_model_worker_batch(requests, tokens, mode, cache_loc)
    make = worker.compilation_manager._make_dummy_batch
    return make(requests, tokens, mode, cache_loc, dp_size=1, per_dp_bs_size=requests)


def _finding(name: str, requests: int, tokens: int, device: Any, error: Exception) -> str:
    """Return the message: the step, the compiler's reason, and what would help."""
    reason = re.sub(r"\s+", " ", str(error)).strip()[:300]
    advice = (
        "a larger engine.page_size, or smaller engine.max_running_requests or "
        "engine.context_length, makes the page table smaller"
    )
    return (
        f"the {name} step of {requests} requests and {tokens} tokens does not compile for "
        f"{device.device_kind}: {reason}; {advice}"
    )
