"""The typed configuration: every key that a config may have, its type, default and unit.

Hydra merges the YAML files of ``conf/`` into these dataclasses, so a misspelled key or a wrong type
is an error when the config is composed, before anything is loaded. This is the reference of the
config keys.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache
from typing import Any, ClassVar

from omegaconf import MISSING, DictConfig, OmegaConf

from kvpipe.config.pipeline_edit import PipelineEdit
from kvpipe.errors import InputError
from kvpipe.suggest import nearest

STOP = "stop"
CONTINUE = "continue"
AUTO = "auto"
DUMMY = "dummy"
ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
"""Architecture of a model that kvpipe generates → ``model_type`` of its ``config.json``."""
_NAME_BYTES = 100
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class TrackingMode(Enum):
    """Destination of W&B's data: its server, local files, or none."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


class OutputFormat(Enum):
    """Format of stdout; ``auto`` is ``table`` on a terminal and ``json`` in a pipe."""

    auto = "auto"
    table = "table"
    json = "json"


class PlanFormat(Enum):
    """Output format of ``kvpipe plan`` and ``kvpipe phases``."""

    table = "table"
    markdown = "markdown"
    json = "json"


class CompareFormat(Enum):
    """Output format of ``kvpipe compare``."""

    markdown = "markdown"
    json = "json"
    html = "html"


Refusal = Callable[[str, Any], None]
"""Raises an InputError, for a key and its value, if the value is wrong; None and MISSING pass."""


def one_of(*valid: str) -> Refusal:
    """Refuse a text that is not in ``valid``."""

    def refuse(key: str, value: Any) -> None:
        if value is not None and value not in valid:
            raise InputError(f"{key} is {value!r}; {nearest(value, valid)}")

    return refuse


def _auto_or_bool(key: str, value: Any) -> None:
    """Refuse what is neither a truth value nor ``auto``."""
    if value not in (True, False, AUTO):
        raise InputError(f"{key} is {value!r}; {nearest(value, (AUTO, 'true', 'false'))}")


def at_least(least: int) -> Refusal:
    """Refuse a number that is not finite or below ``least``."""

    def refuse(key: str, value: Any) -> None:
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise InputError(f"{key} is {value}, it must be at least {least}")

    return refuse


def between(least: int, most: int) -> Refusal:
    """Refuse a number below ``least`` or above ``most``."""

    def refuse(key: str, value: Any) -> None:
        if isinstance(value, int | float) and not least <= value <= most:
            raise InputError(f"{key} is {value}, it must be from {least} to {most}")

    return refuse


def seconds(key: str, value: float | None) -> None:
    """Refuse a time that is not positive or not finite."""
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"{key} is {value}, it must be more than 0 seconds")


def share(key: str, value: float | None) -> None:
    """Refuse a share that is not more than 0 and at most 1."""
    if value is not None and not 0 < value <= 1:
        raise InputError(f"{key} is {value:g}, it must be more than 0 and at most 1")


def positive(key: str, value: float | None) -> None:
    """Refuse a number that is not positive or not finite."""
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"{key} is {value}, it must be more than 0")


def texts(key: str, values: list[Any]) -> None:
    """Refuse an item that is not a text: OmegaConf lets a list pass as an item of list[str]."""
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{key}: {value!r} is of type {type(value).__name__}, not str")


def stops(key: str, values: list[Any]) -> None:
    """Refuse an item that is empty or not a text: it would end every sample at once."""
    texts(key, values)
    if "" in values:
        raise InputError(
            f"{key} has an empty text, which would end every sample at its first token"
        )


def token_ids(key: str, values: list[Any]) -> None:
    """Refuse an item that is not a token id; OmegaConf lets a list pass as an item of list[int]."""
    for value in values:
        if not isinstance(value, int) or value < 0:
            raise InputError(
                f"{key}: {value!r} is not a token id; an id is an integer of at least 0"
            )


def name(key: str, value: str | None) -> None:
    """Refuse a name that is empty, too long, or not one line of printable characters."""
    if value is not None and not (
        value.strip() and value.isprintable() and len(value.encode()) <= _NAME_BYTES
    ):
        raise InputError(
            f"{key} is {value!r}, it must be a name of 1 to {_NAME_BYTES} bytes in printable "
            "characters"
        )


def directory_name(key: str, value: str) -> None:
    """Refuse a name that is a path."""
    name(key, value)
    if "/" in value or not value.strip("."):
        raise InputError(f"{key} is {value!r}, it must be the name of a directory, not a path")


def wandb_id(key: str, value: str | None) -> None:
    """Refuse an id of a run that W&B does not accept."""
    if value is not None and not _WANDB_ID.fullmatch(value):
        raise InputError(f"{key} is {value!r}, it must be 1 to 64 letters, digits, '-' or '_'")


def checked(default: Any, refuse: Refusal) -> Any:
    """Return a dataclass field with this default whose value ``refuse`` checks."""
    return field(default=default, metadata={"refuse": refuse})


def refuse_wrong(kind: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a wrong value of a field of the dataclass ``kind``, by the field's name after ``prefix``.

    Raises:
        InputError: from the ``refuse`` of a :func:`checked` field.
    """
    for each in fields(kind):
        if each.name in values and (refuse := each.metadata.get("refuse")):
            refuse(f"{prefix}{each.name}", values[each.name])


class Section:
    """A section of the config, named ``section``, that refuses wrong values of its fields."""

    _section: ClassVar[str]

    def __init_subclass__(cls, section: str) -> None:
        super().__init_subclass__()
        cls._section = section

    def __post_init__(self) -> None:
        refuse_wrong(self, vars(self), f"{self._section}.")


@dataclass
class TinyModel(Section, section="model.generate"):
    """Shape of the checkpoint that is generated on first use; every field changes its bytes.

    Attributes:
        seed: seed of the weights; the same seed and shape give the same bytes.
        architecture: ``Qwen2ForCausalLM`` (q, k and v biases), ``Qwen3ForCausalLM`` (q and k norms)
            or ``LlamaForCausalLM``.
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        intermediate_size, vocab_size, tie_word_embeddings, max_position_embeddings: as in
            ``config.json``; the vocabulary is 256 bytes, then merges, then the end of the text.
        torch_dtype: dtype of the stored tensors, ``bfloat16``, ``float16`` or ``float32``; the
            values are the same in each.
    """

    seed: int = 0
    architecture: str = checked("Qwen2ForCausalLM", one_of(*ARCHITECTURES))
    hidden_size: int = checked(512, at_least(1))
    num_hidden_layers: int = checked(3, at_least(1))
    num_attention_heads: int = checked(4, at_least(1))
    num_key_value_heads: int = checked(2, at_least(1))
    head_dim: int = checked(128, at_least(1))
    intermediate_size: int = checked(1024, at_least(1))
    vocab_size: int = 512
    tie_word_embeddings: bool = True
    torch_dtype: str = checked("bfloat16", one_of("bfloat16", "float16", "float32"))
    max_position_embeddings: int = checked(2048, at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        key = self._section
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{key}.num_attention_heads is {self.num_attention_heads}, it must be a multiple "
                f"of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"{key}.head_dim is {self.head_dim}, it must be even for RoPE")
        if self.vocab_size <= 256:
            raise InputError(
                f"{key}.vocab_size is {self.vocab_size}, it must be more than 256: one token for "
                "each byte and one for the end of the text"
            )


@dataclass
class ModelConfig:
    """The model to serve.

    Attributes:
        id: name for records and, without ``path`` and ``generate``, the Hugging Face repository.
        path: directory with config.json, safetensors and tokenizer; absolute, or relative to the
            working directory of the command. It takes the place of a generated model.
        revision: revision of the Hugging Face repository, if it is downloaded.
        config: the model's config.json for planning without the hub: a path, or a name of
            ``conf/model/configs``; None is the one there that is named after ``id``.
        generate: shape of a checkpoint to generate.
    """

    id: str = MISSING
    path: str | None = None
    revision: str | None = None
    config: str | None = None
    generate: TinyModel | None = None


@dataclass
class EngineConfig(Section, section="engine"):
    """Arguments of sglang-jax, under the names of its server arguments.

    Attributes:
        device: JAX platform, ``cpu`` or ``tpu``; must agree with JAX_PLATFORMS.
        virtual_devices: number of virtual CPU devices that XLA creates, over all hosts; for ``cpu``
            only.
        tp_size: tensor-parallel size; None means the device count divided by ``dp_size``.
        dp_size: data-parallel size; tp_size × dp_size must equal the device count.
        nnodes: number of hosts; tp_size × dp_size is the device count over all of them.
        node_rank: rank of this host, from 0; None reads KVPIPE_NODE_RANK, TPU_WORKER_ID or
            SLURM_PROCID from the environment, so that the same command runs on every host.
        dist_init_addr: ``HOST:PORT`` of host 0, where the hosts meet; required for several hosts.
        dtype: dtype of parameters and activations, ``bfloat16`` or ``float32``.
        load_format: ``dummy`` starts with random weights, ``auto`` with those of the checkpoint.
        max_total_tokens: capacity of the KV cache on each data-parallel rank, in tokens; it is an
            error if the engine cuts it.
        context_length: longest sequence in tokens; None means the model's limit.
        page_size: tokens per KV page.
        max_running_requests: largest decode batch, in requests.
        max_prefill_tokens: largest prefill batch, in tokens.
        mem_fraction_static: share of HBM for parameters and KV cache, more than 0 and at most 1.
        random_seed: seed of the dummy weights and the sampler.
        precompile: compile all padded batch shapes before the engine is ready.
        download_dir: directory of downloaded Hugging Face files; None means the hub's default.
        trust_remote_code: allow transformers to run code from the checkpoint.
        log_level: level of the engine's log: ``critical``, ``error``, ``warning``, ``info`` or
            ``debug``.
        watchdog_timeout: seconds after which the engine considers a forward step stuck.
        weight_digests: hold every parameter against its source, position by position, whenever
            weights are placed; false saves the time, and no check then knows which weights they are.
    """

    device: str = checked("tpu", one_of("cpu", "tpu"))
    virtual_devices: int | None = checked(None, at_least(1))
    tp_size: int | None = checked(None, at_least(1))
    dp_size: int = checked(1, at_least(1))
    nnodes: int = checked(1, at_least(1))
    node_rank: int | None = checked(None, at_least(0))
    dist_init_addr: str | None = None
    dtype: str = checked("bfloat16", one_of("bfloat16", "float32"))
    load_format: str = checked(DUMMY, one_of(DUMMY, "auto"))
    max_total_tokens: int = checked(MISSING, at_least(1))
    context_length: int | None = checked(None, at_least(1))
    page_size: int = checked(1, at_least(1))
    max_running_requests: int = checked(16, at_least(1))
    max_prefill_tokens: int = checked(1024, at_least(1))
    mem_fraction_static: float = checked(0.8, share)
    random_seed: int = 0
    precompile: bool = False
    download_dir: str | None = None
    trust_remote_code: bool = False
    log_level: str = checked("info", one_of("critical", "debug", "error", "info", "warning"))
    watchdog_timeout: float = checked(1800.0, seconds)
    weight_digests: bool = True


@dataclass
class TrainerConfig(Section, section="trainer"):
    """The trainer that shares the devices with the engine, for pipelines that train.

    Attributes:
        loss: ``sft`` learns the responses of ``data`` (cross entropy); ``grpo`` learns from the rewards
            of a rollout's samples; ``seeded`` learns nothing: its gradients are random numbers,
            without activations, to study memory and speed of the rest.
        data: JSON lines to learn from, each with ``prompt`` and ``response``;
            ``pkg://conf/data/NAME`` is a file that ships with kvpipe. For ``sft``.
        reward: function that scores a sample: ``MODULE:FUNCTION`` of one's own, or the name of one
            that kvpipe or an installed package brings along.
        reward_options: keyword arguments of that function.
        clip_ratio: for ``grpo``, how far from 1 the ratio of a token's new probability to the sampled
            one counts (PPO's clipping).
        kl_coefficient: for ``grpo``, weight of the divergence from the model's files in the loss; 0
            leaves it out.
        entropy_coefficient: for ``grpo``, weight of the entropy, which the loss rewards; 0 leaves it
            out.
        batch_size: examples of a step; for ``grpo`` all samples of a rollout.
        micro_batch_size: examples of a forward and backward pass; a step sums the gradients of
            several. It divides ``batch_size``; None means all at once.
        length: length in tokens to which each example is padded, with its response.
        dtype: dtype of its parameters and of AdamW's second moment, ``float32`` or ``bfloat16``.
        gradients_dtype: dtype of the gradients; None means ``dtype``.
        mu_dtype: dtype of AdamW's first moment (optax's ``mu_dtype``); None means ``dtype``.
        learning_rate: AdamW's learning rate, at least 0; the largest if it changes.
        warmup_steps: steps in which the learning rate rises to its value, in a line; 0 means none.
        decay_steps: steps after them in which it falls to zero, as a cosine; None means never.
        clip_norm: the norm of all gradients together that larger ones are scaled to; None clips none.
        weight_decay: AdamW's weight decay.
        seed: seed of seeded gradients, and of the order of the examples.
        checkpoint_every: cycles of ``repeat`` after which the trainer's state is saved, so that
            ``resume=true`` can continue the run; 0 saves none.
        checkpoint_dir: directory of the checkpoint; None means ``checkpoints`` in the run directory.
    """

    loss: str = checked("seeded", one_of("seeded", "sft", "grpo"))
    data: str | None = None
    reward: str | None = None
    reward_options: dict[str, Any] = field(default_factory=dict)
    clip_ratio: float = checked(0.2, positive)
    kl_coefficient: float = checked(0.0, at_least(0))
    entropy_coefficient: float = checked(0.0, at_least(0))
    batch_size: int = checked(8, at_least(1))
    micro_batch_size: int | None = checked(None, at_least(1))
    length: int = checked(64, at_least(2))
    dtype: str = checked("float32", one_of("float32", "bfloat16"))
    gradients_dtype: str | None = checked(None, one_of("float32", "bfloat16"))
    mu_dtype: str | None = checked(None, one_of("float32", "bfloat16"))
    learning_rate: float = checked(1e-4, at_least(0))
    warmup_steps: int = checked(0, at_least(0))
    decay_steps: int | None = checked(None, at_least(1))
    clip_norm: float | None = checked(None, positive)
    weight_decay: float = checked(1e-4, at_least(0))
    seed: int = checked(0, at_least(0))
    checkpoint_every: int = checked(0, at_least(0))
    checkpoint_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.rows:
            raise InputError(
                f"trainer.micro_batch_size is {self.micro_batch_size}, it must divide "
                f"trainer.batch_size ({self.batch_size})"
            )

    @property
    def learns(self) -> bool:
        """Whether it has a loss."""
        return self.loss != "seeded"

    @property
    def reads_data(self) -> bool:
        """Whether it learns from ``data``."""
        return self.loss == "sft"

    @property
    def rewarded(self) -> bool:
        """Whether it learns from the rewards of samples."""
        return self.loss == "grpo"

    @property
    def has_reference(self) -> bool:
        """Whether its loss compares the model with the one of the model's files."""
        return self.rewarded and self.kl_coefficient > 0

    @property
    def rows(self) -> int:
        """Examples of a forward and backward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass
class PromptConfig:
    """The prompt: exactly one of ``text`` and ``file``.

    Attributes:
        text: the prompt itself.
        file: path of a UTF-8 file; ``pkg://conf/prompt/NAME`` is a file that ships with kvpipe.
        sha256: expected SHA-256 of the prompt's UTF-8 bytes, in hexadecimal; None skips the check.
    """

    text: str | None = None
    file: str | None = None
    sha256: str | None = None


@dataclass
class PromptsConfig(Section, section="prompts"):
    """The prompts of rollouts: at most one of ``file`` and ``texts``.

    Attributes:
        file: path of a UTF-8 file; ``pkg://conf/prompts/NAME`` is a file that ships with kvpipe. If
            its name ends in ``.jsonl`` each line is an object with ``prompt`` (a text) or
            ``messages`` (a chat, for the tokenizer's chat template) and, optionally, ``id`` and
            ``answer``, which rewards read; else each line is a prompt.
        texts: the prompts themselves.
        limit: number of prompts to take, from the first; None takes all.
    """

    file: str | None = None
    texts: list[str] = field(default_factory=list, metadata={"refuse": texts})
    limit: int | None = checked(None, at_least(1))


@dataclass
class SamplingConfig(Section, section="sampling"):
    """Sampling parameters.

    Attributes:
        max_new_tokens: number of tokens to generate.
        temperature: sampling temperature, at least 0; 0.0 is greedy.
        ignore_eos: continue after an end-of-sequence token.
        n: samples of each prompt in a rollout; ``generate`` takes one.
        top_p: smallest sum of probabilities, at temperature 1, that the candidates must have; more
            than 0 and at most 1.
        top_k: number of most probable tokens that are candidates; None means all.
        min_p: probability of a candidate, at least, as a share of the most probable one's, from 0 to 1.
        stop: texts that end a sample.
        stop_token_ids: token ids that end a sample.
        seed: seed of the random numbers, from 0 to 2^31 - 1; the same seed gives the same token ids.
            None draws a new one for each step.
    """

    max_new_tokens: int = checked(64, at_least(1))
    temperature: float = checked(0.0, at_least(0))
    ignore_eos: bool = False
    n: int = checked(1, at_least(1))
    top_p: float = checked(1.0, share)
    top_k: int | None = checked(None, at_least(1))
    min_p: float = checked(0.0, between(0, 1))
    stop: list[str] = field(default_factory=list, metadata={"refuse": stops})
    stop_token_ids: list[int] = field(default_factory=list, metadata={"refuse": token_ids})
    seed: int | None = checked(None, between(0, 2**31 - 1))


@dataclass
class TrackingConfig(Section, section="tracking"):
    """Weights & Biases.

    Attributes:
        mode: ``online``, ``offline`` or ``disabled``.
        project: W&B project.
        name: name of the run; None means WANDB_NAME, or one that W&B makes up.
        entity: W&B team or user; None means WANDB_ENTITY, or the account's default.
        group: name that groups related runs; None means WANDB_RUN_GROUP, or no group, or the sweep's
            name for a job of a sweep.
        tags: tags of the run; a job of a sweep also gets its overrides.
        id: id of the W&B run; None means a new one, or with ``resume`` that of the resumed run.
        fallback_offline: continue offline, with a message, if W&B cannot be reached.
        init_timeout_s: limit of the start, in seconds.
        log_timeout_s: limit for the transfer of a record to W&B's service, in seconds.
        finish_timeout_s: limit of the last tables, and again of the final upload, in seconds.
        text_max_chars: characters of a text shown in media and tables; the files hold all of it.
    """

    mode: TrackingMode = TrackingMode.offline
    project: str = "kvpipe"
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list, metadata={"refuse": texts})
    id: str | None = checked(None, wandb_id)
    fallback_offline: bool = False
    init_timeout_s: float = checked(30.0, seconds)
    log_timeout_s: float = checked(60.0, seconds)
    finish_timeout_s: float = checked(60.0, seconds)
    text_max_chars: int = checked(20000, at_least(1))


@dataclass
class RepeatConfig(Section, section="repeat"):
    """A range of the pipeline's steps that is repeated.

    Attributes:
        first: name of the first repeated step.
        last: name of the last repeated step.
        times: number of repetitions, including the first pass.
    """

    first: str = MISSING
    last: str = MISSING
    times: int = checked(2, at_least(1))


@dataclass
class RunnerConfig(Section, section="runner"):
    """Execution of a run: isolation, time limits, and reactions to failures.

    Attributes:
        isolate: run the engine in a fresh child process; false is for debuggers.
        idle_timeout_s: seconds to wait for the engine to become idle before flush, drop, rebuild
            and probe.
        shutdown_timeout_s: seconds that the worker may take to exit after its last record.
        sample_peaks: sample the memory inside phases too, at a cost of at most 1 % of a core.
        heartbeat_s: seconds between progress lines on stderr while a phase runs, where no terminal
            shows the run live; None writes none.
        phase_timeout_s: limit in seconds of each step, and of the start before the worker's first
            one (importing jax, planning); None means no limit.
        phase_timeouts: step → seconds, in place of ``phase_timeout_s``.
        run_timeout_s: limit in seconds of the whole run until its last step is done; None means no
            limit.
        sink_timeout_s: limit in seconds for one record in each of records.jsonl, report.html,
            timeline.png and a pipe on stdout; None means no limit. W&B's are in ``tracking``.
        on_error: ``stop`` after the first step that fails, or ``continue`` if that step only
            measures; the run fails either way. Cleanup steps run after any failure.
        overwrite: allow a run or a sweep in a directory that has the records of an earlier one,
            which are lost.
        compile_cache_bytes: most bytes of compiled programs that stay in ``cache_dir`` for later runs,
            of all runs together; 0 neither keeps nor loads any. If the environment has
            JAX_COMPILATION_CACHE_DIR, jax's own cache is used instead.
    """

    isolate: bool = True
    idle_timeout_s: float = checked(60.0, seconds)
    shutdown_timeout_s: float = checked(60.0, seconds)
    sample_peaks: bool = True
    heartbeat_s: float | None = checked(30.0, at_least(1))
    phase_timeout_s: float | None = None
    phase_timeouts: dict[str, float] = field(default_factory=dict)
    run_timeout_s: float | None = None
    sink_timeout_s: float | None = checked(300.0, seconds)
    on_error: str = checked(STOP, one_of(STOP, CONTINUE))
    overwrite: bool = False
    compile_cache_bytes: int = checked(2 * 1024**3, at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"phase_timeout_s": self.phase_timeout_s, "run_timeout_s": self.run_timeout_s}
        limits |= {f"phase_timeouts.{step}": limit for step, limit in self.phase_timeouts.items()}
        for name, limit in limits.items():
            seconds(f"runner.{name}", limit)
            if limit is not None and not self.isolate:
                raise InputError(
                    f"runner.{name} is {limit:g}, but runner.isolate is false: only a child "
                    "process can be ended; leave the limit out"
                )


@dataclass
class PlanConfig(Section, section="plan"):
    """The byte plan.

    Attributes:
        enforce: refuse a run that does not fit, and fail a run whose bytes differ from the plan.
        allowance_bytes: allowed difference, in bytes over all devices, between the planned programs
            and the bytes beyond arrays on devices that count by themselves. Parameters, KV cache
            and slots must be exact, and every other array needs an owner.
        format: output format of ``kvpipe plan``.
        target: machine that ``kvpipe plan`` plans for: ``cpu`` (this host), a chip and its
            topology, e.g. ``v5e:2x2x1``, or an accelerator type, e.g. ``v4-32``; None is ``cpu``
            for ``engine.device=cpu`` and ``v4:2x2x1``, a v4-8, for ``tpu``.
        file: file that ``kvpipe plan`` writes; None means stdout.
        compile: add code and temporaries to the plan: of the engine's prefill and decode steps, of
            the trainer's programs and of kvpipe's own, compiled for the target. True compiles the
            programs that the cache lacks, which takes about half a minute; False adds none.
            ``auto`` uses the programs in the cache, and compiles the others for a CPU whose memory
            may not suffice. A run on a TPU takes what ``kvpipe plan`` has compiled.
        prompt_tokens: length of the prompt for ``compile``, in tokens; None estimates it from the
            prompt's bytes. The engine pads it to 64, 128, 256, … tokens.
        micro_batch: find the largest ``trainer.micro_batch_size`` that fits, by halving the divisors
            of ``trainer.batch_size``; compiles the gradients of each that an earlier plan has not,
            which takes minutes for a large model. For ``plan`` with ``compile``.
        timeout_s: limit in seconds of ``kvpipe plan``, for each job of a sweep, and of git in
            ``compare-plans``; None means no limit.
        reserve_bytes: bytes of each device that a plan leaves free, since an allocator cannot give
            what is free in pieces; None is 128 MiB on a TPU and 0 on a CPU, whose pages can lie
            anywhere.
        limit_bytes: bytes of each device that a plan may use, with ``reserve_bytes``; None is all of
            its memory. A run on a CPU can so be planned as for a smaller device.
    """

    enforce: bool = True
    allowance_bytes: int = checked(8 * 1024**2, at_least(0))
    format: PlanFormat = PlanFormat.table
    target: str | None = None
    file: str | None = None
    compile: bool | str = checked(AUTO, _auto_or_bool)
    prompt_tokens: int | None = checked(None, at_least(1))
    micro_batch: bool = False
    timeout_s: float | None = checked(1800.0, seconds)
    reserve_bytes: int | None = checked(None, at_least(0))
    limit_bytes: int | None = checked(None, at_least(1))


@dataclass
class ComparePlansConfig(Section, section="compare_plans"):
    """The two plans that ``kvpipe compare-plans`` compares.

    Attributes:
        base: git revision before the change; None means ``HEAD``, or the working tree if
            ``overrides`` is set without ``head``.
        head: git revision after the change; None means the working tree.
        overrides: overrides of the plan after the change only, each in quotes:
            ``'compare_plans.overrides=["engine.page_size=64"]'``.
        budget_bytes: allowed growth of the peak on a device, in bytes.
    """

    base: str | None = None
    head: str | None = None
    overrides: list[str] = field(default_factory=list, metadata={"refuse": texts})
    budget_bytes: int = checked(0, at_least(0))


@dataclass
class CompareConfig(Section, section="compare"):
    """Comparison of each further run with the first one by ``kvpipe compare``.

    Attributes:
        format: output format.
        file: file to write; None means stdout.
        budget_bytes: allowed growth of parameters, KV cache or a slot, in bytes over all devices.
        allowance_bytes: allowed growth of the values that no plan predicts exactly, in bytes: the
            total, the programs, other arrays, the peak inside a phase. Peaks are sampled, so up to
            1.5 times another one they count as the same.
        outputs: whether a different output exceeds the allowance.
        duration_factor: allowed factor on a phase's duration; None means any. Phases shorter than
            0.1 s do not count.
        compilations: allowed additional programs, compiled or loaded, in a phase; None means any
            number.
    """

    format: CompareFormat = CompareFormat.markdown
    file: str | None = None
    budget_bytes: int = checked(0, at_least(0))
    allowance_bytes: int = checked(512 * 1024**2, at_least(0))
    outputs: bool = True
    duration_factor: float | None = checked(None, at_least(0))
    compilations: int | None = checked(None, at_least(0))


@dataclass
class ReportConfig:
    """Output of ``kvpipe report``.

    Attributes:
        dir: directory of ``report.html`` and ``timeline.png``; None means the records' directory.
    """

    dir: str | None = None


@dataclass
class SweepConfig:
    """Execution of the jobs of a sweep (``-m``).

    Attributes:
        resume: reuse the records of an earlier sweep's job instead of running it again, if that job
            passed with the same config (apart from label, tracking and output) and the same
            versions. Searches this sweep's directory and the ones next to it.
    """

    resume: bool = False


@dataclass
class DescribeConfig:
    """The output of ``kvpipe phases``.

    Attributes:
        phase: name of the phase to print; None prints all. ``kvpipe phases NAME`` sets it.
        format: output format.
    """

    phase: str | None = None
    format: PlanFormat = PlanFormat.table


@dataclass
class Kvpipe:
    """The whole configuration.

    Attributes:
        experiment: name of the experiment, for records and the run directory.
        label: name of this run, for its reports and, without ``tracking.name``, for W&B.
        pipeline: names of the steps, in order.
        pipeline_edit: changes to that list.
        phases: step name → options; ``use`` names the phase.
        phase_path: directories with phases of your own, one file each; relative ones to the working
            directory of the command.
        repeat: range of steps to repeat; cycle k of a step is called ``name#k``.
        resume: continue the run of the run directory after its checkpoint.
        resume_after: cycle that the checkpoint was made after; ``resume`` sets it.
        output: format of stdout.
        sinks: names of further receivers of the records, which installed packages bring along as
            entry points of the group ``kvpipe.sinks``.
        cache_dir: directory of generated checkpoints, compiled programs and plans; None means
            ``$XDG_CACHE_HOME/kvpipe``.
    """

    experiment: str = checked("tiny", directory_name)
    label: str | None = checked(None, name)
    pipeline: list[str] = MISSING
    pipeline_edit: PipelineEdit = field(default_factory=PipelineEdit)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    phase_path: list[str] = field(default_factory=list, metadata={"refuse": texts})
    repeat: RepeatConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    compare_plans: ComparePlansConfig = field(default_factory=ComparePlansConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    resume: bool = False
    resume_after: int | None = checked(None, at_least(1))
    output: OutputFormat = OutputFormat.auto
    sinks: list[str] = field(default_factory=list, metadata={"refuse": texts})
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        refuse_wrong(self, vars(self))


def schema() -> DictConfig:
    """Return the schema that configs are merged into.

    Keys that are names of steps or of a reward's options need no ``+``; they are validated when the
    steps are built and the reward is loaded.
    """
    node = _structured()
    edit = node.pipeline_edit
    open_ones = (
        *(node.phases, node.runner.phase_timeouts, edit.before, edit.after, edit.replace),
        node.trainer.reward_options,
    )
    for mapping in open_ones:
        OmegaConf.set_struct(mapping, False)
    return node


def _structured() -> DictConfig:
    """Return a new node of the dataclasses; a copy takes a fifth of the time of their conversion."""
    return copy.deepcopy(_converted())


@cache
def _converted() -> DictConfig:
    return OmegaConf.structured(Kvpipe)


def to_plain(config: Any) -> dict[str, Any]:
    """Return a composed config as plain dicts, lists and scalars, with interpolations resolved.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a value is missing or cannot be resolved.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> Kvpipe:
    """Return the typed config of :func:`to_plain`'s result, with every value validated again.

    Its pipeline is the edited one.

    Raises:
        InputError: a value, or an edit of the pipeline, is wrong.
    """
    # Per node OmegaConf takes most of a second for 10,000 steps; these are any texts and values.
    typed = {key: value for key, value in plain.items() if key not in ("pipeline", "phases")}
    config = OmegaConf.to_object(OmegaConf.unsafe_merge(_structured(), typed | {"pipeline": []}))
    assert isinstance(config, Kvpipe)
    config = replace(config, pipeline=plain["pipeline"], phases=plain["phases"])
    return _edited(config) if config.pipeline_edit else config


def _edited(config: Kvpipe) -> Kvpipe:
    """Return the config with the edits of its pipeline made."""
    texts("pipeline", config.pipeline)
    steps = config.pipeline_edit.of(config.pipeline)
    gone = {*config.pipeline} - {*steps}
    limits = _without(gone, config.runner.phase_timeouts)
    return replace(
        config,
        pipeline=steps,
        phases=_without(gone, config.phases),
        runner=replace(config.runner, phase_timeouts=limits),
    )


def _without(gone: set[str], by_step: dict[str, Any]) -> dict[str, Any]:
    return {step: value for step, value in by_step.items() if step not in gone}
