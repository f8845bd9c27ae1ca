"""Compile the engine's prefill and decode steps ahead of time for a TPU, on a machine without one.

The engine's own worker is built with abstract weights and KV cache (:mod:`.shapes`), so the limits,
paddings, batches and jitted step are the ones that a run uses. ``jax.experimental.topologies``
describes the TPU and libtpu compiles for it.
"""

import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import compat
from kvpipe.engine.params import closure
from kvpipe.engine.shapes import abstract_worker, sharded_leaves
from kvpipe.errors import KvpipeError
from kvpipe.records.run import Program

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


def compile_steps(
    config: EngineConfig, model_dir: Path, topology: str, prompt_tokens: int
) -> tuple[Program, ...]:
    """Compile the prefill of one prompt and the decode of one request for a TPU topology.

    The topology is e.g. ``v4:2x2x1``; this process needs as many virtual CPU devices. The engine
    pads the length of the prompt to one of its paddings.

    Raises:
        CompileFinding: a step does not compile for the target.
    """
    mesh = target_mesh(config, topology)
    devices = list(mesh.devices.flat)
    compat.bit_width_of_dtypes()
    worker = abstract_worker(config, model_dir, mesh, "tpu")
    token_paddings, request_paddings, _ = worker.get_precompile_paddings()
    batches = [
        ("prefill", "EXTEND", request_paddings[-1], _padded(prompt_tokens, token_paddings)),
        ("decode", "DECODE", request_paddings[0], None),
    ]
    return tuple(
        _compile(worker, devices, name, mode, requests, tokens or requests)
        for name, mode, requests, tokens in batches
    )


def target_mesh(config: EngineConfig, topology: str) -> Mesh:
    """Return the mesh that the engine would build from the devices of a TPU topology."""
    devices = _devices(topology)
    return compat.device_mesh(config.tp_size or len(devices) // config.dp_size, devices)


def _devices(topology: str) -> list[Any]:
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
            f"the engine's kernels are not made for {devices[0].device_kind}: {error}"
        ) from error
    used = compiled.memory_analysis()
    return Program(
        name=name,
        requests=requests,
        tokens=tokens,
        code_bytes=used.generated_code_size_in_bytes,
        temp_bytes=used.temp_size_in_bytes,
        compile_s=round(time.monotonic() - began, 3),
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
    with compat.replaced(runner, "mesh", here), compat.replaced(runner.attn_backend, "mesh", here):
        runner.attn_backend.forward_metadata = runner.attn_backend.get_forward_metadata(batch)
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
