"""kvpipe: declarative phase pipelines for a live sglang-jax engine.

A pipeline is a list of named phases. Each phase declares once what it needs, what state it leaves
and what it does to the memory ledger; the order check, the byte plan and the run-time assertions
all follow from that one declaration.

``__all__`` is the public interface: the same verbs for an engine in a process of one's own
(``docs/guide/attach.md``). Every other name may change with any release. A name is imported when it
is first used, so that ``import kvpipe`` costs nothing and never imports jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpipe.api.attached import Attached, attach, engine_patches
    from kvpipe.api.recording import record
    from kvpipe.checkpoints.safetensors import open_checkpoint
    from kvpipe.errors import (
        CheckFailed,
        EngineError,
        InputError,
        KvpipeError,
        OutOfMemory,
        PhaseError,
        RecordError,
        WeightsError,
    )
    from kvpipe.pipeline.ledger import Ledger

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "CheckFailed",
    "EngineError",
    "InputError",
    "KvpipeError",
    "Ledger",
    "OutOfMemory",
    "PhaseError",
    "RecordError",
    "WeightsError",
    "attach",
    "engine_patches",
    "open_checkpoint",
    "record",
]

_MODULES = {
    "kvpipe.api.attached": ("Attached", "attach", "engine_patches"),
    "kvpipe.api.recording": ("record",),
    "kvpipe.checkpoints.safetensors": ("open_checkpoint",),
    "kvpipe.pipeline.ledger": ("Ledger",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "kvpipe.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
