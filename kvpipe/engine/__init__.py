"""Adapter to sglang-jax: the only package that imports it or touches its private attributes.

It runs in the worker process; the parent imports :mod:`.program_cache` alone, which has no jax.
"""
