"""State that the phases of one run share.

The worker's context holds the engine and what phases pass to each other: parameter sets on the
devices (slots), parameter trees on the host, offloaded state and generated outputs. The parent's has
the tracker.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpipe.checkpoints.model_dir import find_model
from kvpipe.config.examples import read_examples
from kvpipe.config.prompts import Prompt, read_prompts
from kvpipe.config.schema import Kvpipe
from kvpipe.errors import PhaseError
from kvpipe.pipeline.output import Output
from kvpipe.pipeline.rewards import Reward, Rewarded, reward_of
from kvpipe.pipeline.rollout import Rollout

if TYPE_CHECKING:
    from kvpipe.engine.kv_cache import HostKv
    from kvpipe.engine.owners import Owners
    from kvpipe.engine.rollout import InFlight
    from kvpipe.engine.sglang import SglangEngine
    from kvpipe.engine.weights import HostWeights
    from kvpipe.trainer.state import Trainer

_NO_OUTPUT = "step {!r}, which failed, left no output to compare with"


@dataclass
class WorkerContext:
    """State that the phases of the worker share.

    Attributes:
        config: the config that runs.
        prompt: the prompt of every generate.
        slots: named parameter sets on the devices: engine path → array.
        host: named parameter trees on the host.
        outputs: outputs by step name.
        rollouts: rollouts by step name.
        in_flight: the paused rollout, else None.
        jax_ready: whether jax has found its devices.
        started: the engine once it has been started, else None.
        owners: the engine's arrays that are in no pool, once it is ready.
        host_kv: the offloaded KV cache, else None.
        host_weights: the engine's offloaded weights, else None.
        made_trainer: the trainer, on the devices or offloaded, else None.
        rewarded: the samples that were rewarded last, else None.
        reward_means: the mean of each time that samples were rewarded.
        planned_temporaries: bytes on a device of each program that was compiled for the plan, by its
            name there.
        step_peaks: most bytes in use during each training step, over all devices, by step name.
    """

    config: Kvpipe
    prompt: str
    slots: dict[str, dict[str, Any]] = field(default_factory=dict)
    host: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    in_flight: "InFlight | None" = None
    jax_ready: bool = False
    started: "SglangEngine | None" = None
    owners: "Owners | None" = None
    host_kv: "HostKv | None" = None
    host_weights: "HostWeights | None" = None
    made_trainer: "Trainer | None" = None
    rewarded: Rewarded | None = None
    reward_means: list[float] = field(default_factory=list)
    planned_temporaries: Mapping[str, int] = field(default_factory=dict)
    step_peaks: dict[str, int] = field(default_factory=dict)

    @cached_property
    def model_dir(self) -> Path:
        """Directory of the model; the first use may generate or download it."""
        return find_model(self.config)

    @property
    def engine_lives(self) -> bool:
        """Whether no thread of the engine has failed; true too if none was started."""
        return self.started is None or not self.started.failure.happened

    @property
    def engine(self) -> "SglangEngine":
        """The live engine; a PhaseError if it has not been started."""
        return _present(self.started, "the engine has not been started")

    @property
    def trainer(self) -> "Trainer":
        """The trainer, on the devices or offloaded; a PhaseError if there is none."""
        return _present(self.made_trainer, "there is no trainer")

    @property
    def offloaded_kv(self) -> "HostKv":
        """The offloaded KV cache; a PhaseError if there is none."""
        return _present(self.host_kv, "there is no offloaded KV cache")

    @property
    def paused_rollout(self) -> "InFlight":
        """The paused rollout; a PhaseError if there is none."""
        return _present(self.in_flight, "there is no paused rollout")

    @property
    def offloaded_weights(self) -> "HostWeights":
        """The engine's offloaded weights; a PhaseError if there are none."""
        return _present(self.host_weights, "there are no offloaded weights")

    def exchanged_weights(self) -> None:
        """Forget the state that an exchange of the engine's weights, with its flush, invalidates.

        While requests are in flight it flushes nothing, and an offloaded KV cache can be restored.
        """
        self.host_weights = None
        if self.in_flight is None:
            self.host_kv = None

    def output_of(self, step: str) -> Output:
        """Return the output of ``step``.

        Raises:
            PhaseError: it has none, because it failed.
        """
        return _present(self.outputs.get(step), _NO_OUTPUT.format(step))

    def rollout_of(self, step: str) -> Rollout:
        """Return the rollout of ``step``.

        Raises:
            PhaseError: it has none, because it failed.
        """
        return _present(self.rollouts.get(step), _NO_OUTPUT.format(step))

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of every rollout; empty if the config has none."""
        given = self.config.prompts
        return read_prompts(given) if given.file or given.texts else ()

    @cached_property
    def prompt_ids(self) -> list[tuple[int, ...]]:
        """The token ids of each prompt of :attr:`prompts`.

        Raises:
            InputError: the tokenizer cannot be read, or has no template for a chat.
        """
        from kvpipe.checkpoints import tokenizer

        return tokenizer.prompt_ids(self.prompts, self._tokenizer)

    @property
    def ids_by_prompt(self) -> dict[str, tuple[int, ...]]:
        """The token ids of each prompt of rollouts, by its id."""
        return {p.id: ids for p, ids in zip(self.prompts, self.prompt_ids, strict=True)}

    @cached_property
    def reward(self) -> Reward:
        """The function that scores samples.

        Raises:
            InputError: there is none, or it cannot be loaded.
        """
        return reward_of(self.config)

    @cached_property
    def examples(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The token ids of prompt and response of each example that the trainer learns from.

        Raises:
            InputError: the file or the tokenizer cannot be read.
        """
        from kvpipe.checkpoints import tokenizer

        return tokenizer.example_ids(read_examples(self.config.trainer), self._tokenizer)

    @cached_property
    def _tokenizer(self) -> Any:
        from kvpipe.checkpoints.tokenizer import open_tokenizer

        return open_tokenizer(self.model_dir)

    def hf_weights(self, source: str | None) -> Mapping[str, Any]:
        """Return the weights of a host tree, or of the model's files, named as in Hugging Face.

        Raises:
            InputError: the checkpoint is missing or damaged.
        """
        from kvpipe.checkpoints import mllm, safetensors

        if source:
            return mllm.hf_weights(self.host[source])
        return safetensors.open_checkpoint(self.model_dir)


def _present[T](value: T | None, if_missing: str) -> T:
    """Return ``value``, or raise PhaseError with ``if_missing`` if it is None."""
    if value is None:
        raise PhaseError(if_missing)
    return value


@dataclass(frozen=True)
class ParentContext:
    """The config that runs, and how to begin the W&B run.

    ``start_tracking`` returns the run's name and where it writes.
    """

    config: Kvpipe
    start_tracking: Callable[[], dict[str, Any]]
