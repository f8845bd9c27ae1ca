"""kvpipe: declarative phase pipelines for a live sglang-jax engine.

A pipeline is a list of named phases. Each phase declares once what it needs, what state it leaves
and what it does to the memory ledger; the order check, the byte plan and the run-time assertions
all follow from that one declaration.
"""

__version__ = "0.1.0"
