"""The parent process: it supervises the worker and never imports jax."""
