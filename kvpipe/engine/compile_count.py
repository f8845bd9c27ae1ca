"""Count the programs that XLA compiles, through jax's own monitoring events."""

from typing import Any

_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts from its creation on; one a process is enough, jax has no way to unregister it."""

    def __init__(self) -> None:
        from jax import monitoring

        self._count = 0
        monitoring.register_event_duration_secs_listener(self._on_event)

    def take(self) -> int:
        """Return the number of compilations since the last call."""
        taken, self._count = self._count, 0
        return taken

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILED:
            self._count += 1
