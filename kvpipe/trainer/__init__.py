"""The trainer that shares the devices with the engine: jax and optax, and no engine."""
