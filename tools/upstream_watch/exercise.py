"""Every operation of the adapter, once each, on the tiny model, so that they can be observed."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.config.schema import EngineConfig, SamplingConfig
from kvpipe.pipeline.rollout import Request

DEVICES = 4
CONFIG = EngineConfig(
    device="cpu",
    tp_size=DEVICES,
    max_total_tokens=1024,
    context_length=256,
    max_running_requests=2,
    max_prefill_tokens=128,
    log_level="error",
)
_IDLE_TIMEOUT_S = 120.0
_FEW_TOKENS = SamplingConfig(max_new_tokens=4, ignore_eos=True)
_REQUESTS = [Request("Hello", index, (39, 266, 419), seed=index) for index in range(3)]

Step = tuple[str, Callable[[], Any]]


def steps(model_dir: Path) -> Iterator[Step]:
    """Yield the adapter's operations by name; the first one starts the engine."""
    from kvpipe.engine import kv_cache, rollout, sglang, shapes, weights

    kept: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        kept[name] = value

    def engine() -> sglang.SglangEngine:
        return kept["engine"]

    yield "plan from shapes", lambda: shapes.of_devices_here(CONFIG, model_dir).arrays([512])
    yield "start", lambda: keep("engine", sglang.start(CONFIG, model_dir, _IDLE_TIMEOUT_S))
    yield "generate", lambda: engine().generate("Hello", _FEW_TOKENS)
    yield "roll out", lambda: rollout.roll_out(engine(), _REQUESTS, _FEW_TOKENS)
    pause = partial(rollout.pause, requests=_REQUESTS, sampling=_FEW_TOKENS, after_tokens=2)
    yield "pause a rollout", lambda: keep("rollout", pause(engine()))
    yield "resume it", lambda: rollout.resume(engine(), kept.pop("rollout"))
    yield "flush", lambda: engine().flush()
    yield "drop the KV cache", lambda: kv_cache.drop(engine())
    yield "rebuild it", lambda: kv_cache.rebuild(engine())
    yield "drop it again", lambda: kv_cache.drop(engine())
    yield "rebuild it smaller", lambda: kv_cache.rebuild(engine(), 512)
    yield "generate again", lambda: engine().generate("Hello", _FEW_TOKENS)
    yield "offload the KV cache", lambda: keep("kv", kv_cache.offload(engine())[1])
    yield "restore it", lambda: kv_cache.restore(engine(), kept.pop("kv"))
    yield "flush again", lambda: engine().flush()
    checkpoint = open_checkpoint(model_dir)
    yield "swap weights", lambda: weights.swap(engine(), weights.build(engine(), checkpoint))
    yield "stream weights", lambda: weights.stream(engine(), checkpoint)
    yield "offload weights", lambda: keep("weights", weights.offload(engine())[1])
    yield "restore weights", lambda: weights.restore(engine(), kept.pop("weights"))
    yield "shut down", lambda: engine().shut_down()
