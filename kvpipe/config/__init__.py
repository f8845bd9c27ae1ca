"""The configuration: its schema, what Hydra needs, the prompt, jax's environment, the hosts."""
