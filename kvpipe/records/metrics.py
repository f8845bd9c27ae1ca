"""Metric keys that dashboards know, for the numbers of a phase's record."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvpipe.records.run import Memory, Peak, PhaseRecord

_ROLLOUT = (
    "requests",
    "distinct_samples",
    "prompt_tokens",
    "decode_tokens",
    "cache_hit_rate",
    "tokens_per_second",
    "mean_logprob",
)
_REWARD = ("reward_mean", "reward_spread")
_TRAIN = (
    *("loss", "entropy", "kl", "sampled_kl", "clipped_share", *_REWARD),
    *("gradient_norm", "learning_rate", "tokens_per_second"),
)


def metrics(record: PhaseRecord) -> dict[str, int | float | str]:
    """Return a phase's values under the metric keys that existing dashboards use.

    The keys are those of the script that kvpipe replaces; ``time/duration_s``, ``ledger/<pool>``,
    ``plan/<pool>_error_bytes``, ``compile/...``, ``time/outside_s``, ``mem/process/peak_rss_bytes``,
    ``mem/peak/...`` (inside the phase), ``train/...``, ``rollout/...`` and ``policy/...`` are kvpipe's.
    """
    values: dict[str, int | float | str] = {
        "phase/idx": record.idx,
        "phase/name": record.phase,
        "time/elapsed_s": record.elapsed_s,
        "time/duration_s": record.duration_s,
        "time/outside_s": record.outside_s,
        "mem/process/rss_bytes": record.memory.process_rss_bytes,
        "mem/process/peak_rss_bytes": record.memory.process_peak_rss_bytes,
        "compile/count": record.compilations,
        "compile/seconds": record.compile_s,
        "compile/loaded": record.programs_loaded,
    }
    values |= dict(_device_metrics(record.memory))
    values |= dict(_peak_metrics(record.peak))
    values |= {f"ledger/{pool}_bytes": size for pool, size in record.ledger.items()}
    values |= {f"plan/{pool}_error_bytes": n for pool, n in record.plan_error_bytes.items()}
    values |= dict(_field_metrics(record.fields))
    return values


def _device_metrics(memory: Memory) -> Iterator[tuple[str, int]]:
    for name, value in memory.jax_device_memory_summary.items():
        yield f"mem/jax/{name}", value
    for device, stats in enumerate(memory.jax_device_memory_stats):
        for name, value in stats.items():
            yield f"mem/jax/device{device}/{name}", value


def _peak_metrics(peak: Peak | None) -> Iterator[tuple[str, int]]:
    if peak is None:
        return
    yield "mem/peak/process_rss_bytes", peak.process_rss_bytes
    yield "mem/peak/samples", peak.samples
    if peak.bytes_in_use:
        yield "mem/peak/bytes_in_use_total", peak.bytes_in_use_total
    for device, size in enumerate(peak.bytes_in_use):
        yield f"mem/peak/device{device}/bytes_in_use", size


def _field_metrics(fields: Mapping[str, Any]) -> Iterator[tuple[str, int | float | str]]:
    for info in (fields.get("drop_info"), fields.get("rebuild_info")):
        for name in ("fused_bytes_total", "fused_bytes_per_layer", "deleted_buffers"):
            if isinstance(info, Mapping) and name in info:
                yield f"kv/{name}", info[name]
    for name in ("num_params", "num_model_state_leaves", "sgl_jax_version", "weights_digest"):
        if fields.get(name) is not None:
            yield name, fields[name]
    kind = "train" if "train_step" in fields else "rollout"
    for name in _TRAIN if kind == "train" else _REWARD:
        if name in fields:
            yield f"{kind}/{name}", fields[name]
    if "policy_difference" in fields:
        for name in ("mean", "most"):
            yield f"policy/difference_{name}", fields["policy_difference"][name]
    if "rollout_sha256" in fields:
        for name in _ROLLOUT:
            yield f"rollout/{name}", fields[name]
        yield "rollout/first_token_s", fields["first_token_s"]["median"]
    if "same_output" in fields:
        yield "determinism/same_output", fields["same_output"]
