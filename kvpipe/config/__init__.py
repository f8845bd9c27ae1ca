"""The configuration: schema, Hydra's store and messages, prompt, jax's environment, hosts."""
