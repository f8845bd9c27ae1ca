"""The virtual CPU devices of every benchmark: one a core of the machine that the goals are for."""

import os

DEVICES = 2


def use_virtual_devices() -> None:
    """Let jax find :data:`DEVICES` CPU devices; to be called before it is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
