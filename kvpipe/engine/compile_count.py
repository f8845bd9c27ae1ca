"""Count the programs that XLA compiles, through jax's own monitoring events."""

import sys
from dataclasses import dataclass
from typing import Any

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Compilations:
    """What was compiled: how many programs, and for how many seconds on all threads."""

    count: int = 0
    seconds: float = 0.0


class CompileCounter:
    """Counts from the moment that jax is imported; it does not import jax itself.

    One a process is enough: jax has no way to take a listener back.
    """

    def __init__(self) -> None:
        self._taken = Compilations()
        self._listening = False

    def take(self) -> Compilations:
        """Return the compilations since the last call."""
        if not self._listening and "jax" in sys.modules:
            from jax import monitoring

            monitoring.register_event_duration_secs_listener(self._on_event)
            self._listening = True
        taken, self._taken = self._taken, Compilations()
        return taken

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILED:
            taken = self._taken
            self._taken = Compilations(taken.count + 1, taken.seconds + duration_secs)
