"""The trainer that shares the devices with the engine; it uses jax and optax, never the engine."""
