"""What the phases of one run share.

The worker's context holds the engine and what phases hand to each other: parameter sets on the
devices (slots), parameter trees on the host, and generated outputs. The parent's has the tracker.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpipe.errors import KvpipeError, PhaseError
from kvpipe.model_dir import find_model
from kvpipe.schema import Kvpipe

if TYPE_CHECKING:
    from kvpipe.engine.kv_cache import HostKv
    from kvpipe.engine.sglang import SglangEngine
    from kvpipe.engine.weights import HostWeights
    from kvpipe.trainer.state import Trainer


@dataclass(frozen=True)
class Output:
    """A generated text.

    Attributes:
        text: the new text, without the prompt.
        token_ids: ids of the new tokens.
        prompt_tokens: length of the prompt in tokens.
        cached_tokens: how many of those were found in the prefix cache.
        raw: the engine's whole answer, JSON-serialisable.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    raw: Mapping[str, Any]


@dataclass
class WorkerContext:
    """Shared by the phases of the worker.

    Attributes:
        config: the config that runs.
        prompt: the prompt that generates take.
        slots: named parameter sets on the devices: engine path → array.
        host: named parameter trees on the host.
        outputs: outputs by step name.
        kv: what was offloaded of the KV cache, else None.
        weights: the engine's offloaded weights, else None.
        jax_ready: whether jax has found its devices.
        started: the engine once it has been started, else None.
        trainer: the trainer, on the devices or offloaded, else None.
        step_peaks: most bytes in use during each training step, over all devices, by step name.
    """

    config: Kvpipe
    prompt: str
    slots: dict[str, dict[str, Any]] = field(default_factory=dict)
    host: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    kv: "HostKv | None" = None
    weights: "HostWeights | None" = None
    jax_ready: bool = False
    started: "SglangEngine | None" = None
    trainer: "Trainer | None" = None
    step_peaks: dict[str, int] = field(default_factory=dict)

    @cached_property
    def model_dir(self) -> Path:
        """Directory of the model; the first use may generate or download it."""
        return find_model(self.config)

    @property
    def engine_lives(self) -> bool:
        """Whether no thread of the engine has failed; true too if none was started."""
        return self.started is None or not self.started.failure.happened

    def output_of(self, step: str) -> Output:
        """Return what ``step`` generated.

        Raises:
            PhaseError: it failed before.
        """
        if step not in self.outputs:
            raise PhaseError(f"step {step!r}, which failed, left no output to compare with")
        return self.outputs[step]

    @property
    def engine(self) -> "SglangEngine":
        """The live engine.

        Raises:
            KvpipeError: it has not been started.
        """
        if self.started is None:
            raise KvpipeError("the engine has not been started")
        return self.started


@dataclass(frozen=True)
class ParentContext:
    """Shared by the phases of the parent.

    Attributes:
        config: the config that runs.
        start_tracking: begin the W&B run; returns what it is called and where it writes.
    """

    config: Kvpipe
    start_tracking: Callable[[], dict[str, Any]]
