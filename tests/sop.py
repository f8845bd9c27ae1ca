"""The SOP's procedure, written down once for the tests: its steps in their order."""

STEPS = [
    "wandb_init",
    "jax_ready",
    "engine_ready_dummy",
    "mllm_params_cpu_ready",
    "sglang_param_dict_ready",
    "weights_swapped_from_mllm",
    "param_sharing_check",
    "after_cleanup",
    "generate_result",
    "flush_cache_before_kv_drop",
    "kv_cache_dropped",
    "sglang_param_dict2_ready",
    "after_drop_mllm_params_cpu",
    "kv_cache_rebuilt",
    "generate_result_after_kv_rebuild",
    "after_drop_param_dict2",
]
