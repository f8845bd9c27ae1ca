"""Count the programs that XLA compiles, through jax's own monitoring events."""

import sys
from typing import Any

_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts from the moment that jax is imported; it does not import jax itself.

    One a process is enough: jax has no way to take a listener back.
    """

    def __init__(self) -> None:
        self._count = 0
        self._listening = False

    def take(self) -> int:
        """Return the number of compilations since the last call."""
        if not self._listening and "jax" in sys.modules:
            from jax import monitoring

            monitoring.register_event_duration_secs_listener(self._on_event)
            self._listening = True
        taken, self._count = self._count, 0
        return taken

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILED:
            self._count += 1
