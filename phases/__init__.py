"""The phases: one small file each, named as ``use`` names it. They import kvpipe only.

What needs jax or the engine is imported inside ``run``, so that the parent process can read a
phase's declarations without either.
"""
