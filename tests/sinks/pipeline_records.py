"""Synthetic records in the shape of the full pipeline, for the tests of the sinks."""

import hashlib
from dataclasses import replace

from kvpipe.records.run import (
    Check,
    Fit,
    Memory,
    Peak,
    PhaseRecord,
    PlannedPhase,
    RunFinished,
    RunPlanned,
    RunStarted,
    check_equal,
)
from tests.sop import STEPS

PROMPT = 'Say "<b>hi</b>" & 你好\r\nthen stop.'
OUTPUT = "<script>1 && 2</script>\u2028" + "tokens " * 30
KV_BYTES, PARAM_BYTES = 9_663_750_144, 6_248_972_288


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def generated(text, **more):
    return {
        "prompt": PROMPT,
        "prompt_sha256": sha256(PROMPT),
        "text": text,
        "text_sha256": sha256(text),
        "token_ids": [1, 2, 3],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 4},
        "raw": {"text": text},
        "log_text": True,
        **more,
    }


KV_INFO = {"fused_bytes_total": KV_BYTES, "fused_bytes_per_layer": KV_BYTES // 36}
FIELDS = {
    "mllm_params_cpu_ready": {"num_params": 434},
    "sglang_param_dict_ready": {"num_model_state_leaves": 434},
    "jax_ready": {"sgl_jax_version": "0.0.2"},
    "kv_cache_dropped": {"drop_info": {**KV_INFO, "deleted_buffers": 36}},
    "kv_cache_rebuilt": {"rebuild_info": KV_INFO},
    "generate_result": generated(OUTPUT),
    "generate_result_after_kv_rebuild": generated(OUTPUT, same_output=1),
}


def memory(idx, devices=4):
    if idx == 0:
        return Memory(process_rss_bytes=200 << 20, process_peak_rss_bytes=210 << 20)
    stats = [
        {
            "bytes_in_use": 1000 + idx + device,
            "peak_bytes_in_use": 2000,
            "bytes_limit": 32 << 30,
            "largest_free_block_bytes": 1 << 30,
        }
        for device in range(devices)
    ]
    return Memory((3 << 30) + idx, 4 << 30, stats, "device")


def peak(idx):
    """Return a peak one GiB a device above what the devices hold after the phase."""
    if idx == 0:
        return None
    share = sum(ledger(idx).values()) // 4 + (1 << 30)
    return Peak((share,) * 4, 4 * share, 5 << 30, 10, "device")


def ledger(idx):
    pools = {"other": 157_696}
    if idx >= STEPS.index("engine_ready_dummy"):
        pools["params"] = PARAM_BYTES
        if not STEPS.index("kv_cache_dropped") <= idx < STEPS.index("kv_cache_rebuilt"):
            pools["kv"] = KV_BYTES
    if STEPS.index("sglang_param_dict2_ready") <= idx < len(STEPS) - 1:
        pools["slot:param_dict2"] = PARAM_BYTES
    return pools if idx else {}


def phase(idx, name=None, **more):
    step = STEPS[idx]
    checks = (check_equal("freed bytes", KV_BYTES, KV_BYTES),) if step == "kv_cache_dropped" else ()
    given = {
        "phase": name or step,
        "use": step,
        "idx": idx,
        "elapsed_s": 1.5 * idx,
        "duration_s": 1.25,
        "memory": memory(idx),
        "peak": peak(idx),
        "ledger": ledger(idx),
        "plan_error_bytes": {"kv": 0, "params": 0} if idx else {},
        "compilations": 2 if "generate" in step else 0,
        "checks": checks,
        "fields": FIELDS.get(step, {}),
    }
    return PhaseRecord(**given | more)


def plan():
    both = {"params": PARAM_BYTES, "kv": KV_BYTES}
    phases = (
        PlannedPhase("wandb_init", {}, 0, 0),
        PlannedPhase("engine_ready_dummy", both, PARAM_BYTES + KV_BYTES, 4 << 30),
    )
    fit = Fit(True, 32 << 30, "engine_ready_dummy", 1 << 20)
    return RunPlanned("v4:2x2x1", 4, "0.0.2", phases, fit)


def with_peak(record, total, rss=1):
    """Return the record with a peak inside its phase."""
    return replace(record, peak=Peak((total // 4,) * 4, total, rss, 2, "device"))


def pipeline():
    return [phase(idx) for idx in range(len(STEPS))]


def started(config=None):
    return RunStarted(
        experiment="tiny",
        config=config or {"experiment": "tiny", "engine": {"max_total_tokens": 131_072}},
        steps=tuple(STEPS),
        versions={"python": "3.12.0", "kvpipe": "0.1.0"},
        started_at="2026-01-02T03:04:05+00:00",
    )


def passed(run_dir="/runs/1", **more):
    return RunFinished(
        **{
            "status": "passed",
            "exit_code": 0,
            "run_dir": str(run_dir),
            "elapsed_s": 41.25,
            "checks": (check_equal("freed bytes", KV_BYTES, KV_BYTES),),
        }
        | more
    )


def failed(run_dir="/runs/1"):
    checks = (
        check_equal("freed bytes", KV_BYTES, KV_BYTES),
        Check("same output", [1, 2, 3], [1, 2, 4], False, "first differing token at index 2"),
    )
    error = "generate_result_after_kv_rebuild: the check 'same output' failed"
    return passed(run_dir, status="failed", exit_code=1, checks=checks, error=error)
