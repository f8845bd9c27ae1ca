"""The only room that knows sgl_jax and its private attributes. It runs in the worker alone."""
