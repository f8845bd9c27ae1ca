"""Count the programs that XLA compiles or jax loads, through jax's own monitoring events."""

import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

# jax reports the start of a compilation as a scalar and its end as a duration, also of a program that
# it then finds in its cache; the thread that finds one reports that in between.
_COMPILE = "/jax/core/compile/backend_compile_duration"
_LOADED = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Compilations:
    """Number of compiled and of loaded programs, and the seconds for both, summed over all threads."""

    count: int = 0
    seconds: float = 0.0
    loaded: int = 0

    @property
    def programs(self) -> int:
        """Compiled and loaded ones together."""
        return self.count + self.loaded


class CompileCounter:
    """Count compiled and loaded programs from the moment jax is imported, without importing jax.

    Make one per process: jax cannot unregister a listener.

    Attributes:
        total: number of programs compiled or loaded so far, also of those between two phases.
    """

    def __init__(self) -> None:
        self.total = 0
        self._taken = Compilations()
        self._listening = False
        self._began: float | None = None
        self._here = threading.local()

    @property
    def so_far(self) -> Compilations:
        """The compilations since the last :meth:`take`; safe to read from any thread."""
        return self._taken

    @property
    def compiling_s(self) -> float | None:
        """Seconds since the compilation in progress began; None if none is in progress."""
        began = self._began
        return None if began is None else time.monotonic() - began

    def take(self) -> Compilations:
        """Return the compilations since the last call and reset the count."""
        if not self._listening and "jax" in sys.modules:
            from jax import monitoring

            monitoring.register_event_duration_secs_listener(self._on_end)
            monitoring.register_scalar_listener(self._on_begin)
            monitoring.register_event_listener(self._on_event)
            self._listening = True
        taken, self._taken = self._taken, Compilations()
        return taken

    def _on_begin(self, event: str, value: float, **kwargs: Any) -> None:
        if event == _COMPILE:
            self._began = time.monotonic()
            self._here.loaded = 0

    def _on_event(self, event: str, **kwargs: Any) -> None:
        if event == _LOADED:
            self._here.loaded = 1

    def _on_end(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILE:
            self._began = None
            self.total += 1
            taken, loaded = self._taken, getattr(self._here, "loaded", 0)
            self._taken = Compilations(
                taken.count + 1 - loaded, taken.seconds + duration_secs, taken.loaded + loaded
            )
