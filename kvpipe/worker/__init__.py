"""The worker process: it holds jax and the engine, runs the phases and measures."""
