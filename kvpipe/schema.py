"""The typed configuration: every key that a config may have, its type, default and unit.

Hydra merges the YAML files of ``conf/`` into these dataclasses, so a misspelled key or a wrong type
is an error when the config is composed, before anything is loaded.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from kvpipe.errors import InputError
from kvpipe.suggest import nearest

STOP = "stop"
CONTINUE = "continue"
_LOG_LEVELS = ("critical", "debug", "error", "info", "warning")


class TrackingMode(Enum):
    """Where W&B writes."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


class OutputFormat(Enum):
    """What stdout shows; ``auto`` is ``table`` at a terminal and ``json`` when piped."""

    auto = "auto"
    table = "table"
    json = "json"


class PlanFormat(Enum):
    """How ``kvpipe plan`` and ``kvpipe phases`` print."""

    table = "table"
    markdown = "markdown"
    json = "json"


class CompareFormat(Enum):
    """How ``kvpipe compare`` prints."""

    markdown = "markdown"
    json = "json"
    html = "html"


@dataclass
class TinyModelConfig:
    """Shape of the checkpoint that is generated on first use.

    Attributes:
        seed: seed of the weights; the files are the same bytes for the same seed and shape.
        architecture: class name in Hugging Face's ``config.json``.
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        intermediate_size, vocab_size, tie_word_embeddings, max_position_embeddings: as in
            ``config.json``.
        torch_dtype: dtype of the stored tensors, ``bfloat16`` or ``float32``.
    """

    seed: int = 0
    architecture: str = "Qwen2ForCausalLM"
    hidden_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 1024
    vocab_size: int = 512
    tie_word_embeddings: bool = True
    torch_dtype: str = "bfloat16"
    max_position_embeddings: int = 2048


@dataclass
class ModelConfig:
    """Which model is served.

    Attributes:
        id: name for records and, without ``path`` and ``generate``, the Hugging Face repository.
        path: directory with config.json, safetensors and tokenizer; absolute, or relative to
            where the command was typed.
        revision: revision of the Hugging Face repository, if it is downloaded.
        config: name of a config.json that ships with kvpipe (``conf/model/configs``), for planning
            without a hub.
        generate: shape of a generated checkpoint; makes ``path`` unnecessary.
    """

    id: str = MISSING
    path: str | None = None
    revision: str | None = None
    config: str | None = None
    generate: TinyModelConfig | None = None


@dataclass
class EngineConfig:
    """How sglang-jax is started; the names are those of its server arguments.

    Attributes:
        device: JAX platform, ``cpu`` or ``tpu``; has to agree with JAX_PLATFORMS.
        virtual_devices: number of CPU devices that XLA pretends to have, on all hosts together;
            for ``cpu`` only.
        tp_size: tensor-parallel size; None takes the device count divided by ``dp_size``.
        dp_size: data-parallel size; tp_size × dp_size has to be the device count.
        nnodes: number of hosts; tp_size × dp_size is the device count of all of them.
        node_rank: which of the hosts this one is, from 0; None takes KVPIPE_NODE_RANK,
            TPU_WORKER_ID or SLURM_PROCID from the environment, so that one command is typed on all.
        dist_init_addr: ``HOST:PORT`` of host 0, where the hosts meet; needed if there are several.
        dtype: dtype of parameters and activations, ``bfloat16`` or ``float32``.
        load_format: ``dummy`` starts with random weights, ``auto`` with those of the checkpoint.
        max_total_tokens: capacity of the KV cache in tokens; a cut by the engine is an error.
        context_length: longest sequence in tokens; None takes the model's.
        page_size: tokens in a KV page.
        max_running_requests: largest decode batch.
        max_prefill_tokens: tokens that one prefill batch may have.
        mem_fraction_static: share of HBM that the engine may plan with.
        random_seed: seed of the dummy weights and the sampler.
        precompile: compile all padded batch shapes before the engine is ready.
        download_dir: where Hugging Face files are kept; None takes the hub's default.
        trust_remote_code: let transformers run code from the checkpoint.
        log_level: level of the engine's own log.
        watchdog_timeout: seconds after which the engine calls a forward step stuck.
    """

    device: str = "tpu"
    virtual_devices: int | None = None
    tp_size: int | None = None
    dp_size: int = 1
    nnodes: int = 1
    node_rank: int | None = None
    dist_init_addr: str | None = None
    dtype: str = "bfloat16"
    load_format: str = "dummy"
    max_total_tokens: int = MISSING
    context_length: int | None = None
    page_size: int = 1
    max_running_requests: int = 16
    max_prefill_tokens: int = 1024
    mem_fraction_static: float = 0.8
    random_seed: int = 0
    precompile: bool = False
    download_dir: str | None = None
    trust_remote_code: bool = False
    log_level: str = "info"
    watchdog_timeout: float = 1800.0

    def __post_init__(self) -> None:
        _check_choice("engine.device", self.device, "cpu", "tpu")
        _check_choice("engine.dtype", self.dtype, "bfloat16", "float32")
        _check_choice("engine.load_format", self.load_format, "dummy", "auto")
        for name in (
            "virtual_devices",
            "tp_size",
            "dp_size",
            "nnodes",
            "max_total_tokens",
            "context_length",
            "page_size",
            "max_running_requests",
            "max_prefill_tokens",
        ):
            _check_at_least(1, f"engine.{name}", getattr(self, name))
        _check_at_least(0, "engine.node_rank", self.node_rank)
        _check_choice("engine.log_level", self.log_level, *_LOG_LEVELS)
        _check_seconds("engine.watchdog_timeout", self.watchdog_timeout)
        if not 0 < self.mem_fraction_static <= 1:
            raise InputError(
                f"engine.mem_fraction_static is {self.mem_fraction_static:g}, it has to be more "
                "than 0 and at most 1"
            )


@dataclass
class TrainerConfig:
    """The trainer that shares the devices with the engine, for pipelines that have one.

    Attributes:
        dtype: dtype of its parameters and of AdamW's second moment, ``float32`` or ``bfloat16``.
        gradients_dtype: dtype of the gradients; None takes ``dtype``.
        mu_dtype: dtype of AdamW's first moment, as optax calls it; None takes ``dtype``.
        learning_rate: AdamW's learning rate, the same in every step.
        weight_decay: AdamW's weight decay.
        seed: seed of the gradients.
    """

    dtype: str = "float32"
    gradients_dtype: str | None = None
    mu_dtype: str | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dtype", "gradients_dtype", "mu_dtype"):
            if (value := getattr(self, name)) is not None:
                _check_choice(f"trainer.{name}", value, "float32", "bfloat16")
        for name in ("learning_rate", "weight_decay", "seed"):
            _check_at_least(0, f"trainer.{name}", getattr(self, name))


@dataclass
class PromptConfig:
    """The prompt: ``text`` or ``file``, one of them.

    Attributes:
        text: the prompt itself.
        file: path of a UTF-8 file; ``pkg://conf/prompt/NAME`` is one that ships with kvpipe.
        sha256: expected SHA-256 of the prompt's UTF-8 bytes, in hexadecimal.
    """

    text: str | None = None
    file: str | None = None
    sha256: str | None = None


@dataclass
class SamplingConfig:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: tokens to generate.
        temperature: 0.0 is greedy.
        ignore_eos: go on after an end-of-sequence token.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_at_least(1, "sampling.max_new_tokens", self.max_new_tokens)
        _check_at_least(0, "sampling.temperature", self.temperature)


@dataclass
class TrackingConfig:
    """Weights & Biases.

    Attributes:
        mode: online, offline or disabled.
        project: W&B project.
        name: name of the run.
        entity: W&B team or user; None takes the account's default.
        group: what runs belong together; None is none, or for a job of a sweep the sweep's name.
        tags: tags of the run; a job of a sweep has its overrides besides.
        fallback_offline: go on offline, and say so, when online cannot be had.
        init_timeout_s: seconds that the first contact with the server may take.
        finish_timeout_s: seconds that the upload at the end may take.
        text_max_chars: characters of a text that media and tables show; the files hold all.
    """

    mode: TrackingMode = TrackingMode.offline
    project: str = "kvpipe"
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    fallback_offline: bool = False
    init_timeout_s: float = 30.0
    finish_timeout_s: float = 60.0
    text_max_chars: int = 20000

    def __post_init__(self) -> None:
        _check_seconds("tracking.init_timeout_s", self.init_timeout_s)
        _check_seconds("tracking.finish_timeout_s", self.finish_timeout_s)
        _check_at_least(1, "tracking.text_max_chars", self.text_max_chars)
        _check_texts("tracking.tags", self.tags)


@dataclass
class RepeatConfig:
    """A stretch of the pipeline that is carried out several times.

    Attributes:
        first: name of its first step.
        last: name of its last step.
        times: how often, the first time included.
    """

    first: str = MISSING
    last: str = MISSING
    times: int = 2

    def __post_init__(self) -> None:
        _check_at_least(1, "repeat.times", self.times)


@dataclass
class RunnerConfig:
    """How the run is carried out.

    Attributes:
        isolate: run the engine in a fresh child process; false is for a debugger.
        idle_timeout_s: seconds to wait for the engine to become idle before flush, drop, rebuild
            and probe.
        shutdown_timeout_s: seconds that the worker may take to end after its last record.
        sample_peaks: look at the memory inside phases too, for at most 1 % of a core.
        heartbeat_s: seconds from one line on stderr to the next while a phase runs, where no
            terminal shows the run; None writes none.
        phase_timeout_s: seconds that a step of the engine's process may take, and what stands
            before the first of them (importing jax, planning); None sets no limit.
        phase_timeouts: step → seconds, instead of ``phase_timeout_s``.
        run_timeout_s: seconds that the run may take until its last step is done; None sets no
            limit. Steps before the engine's process are limited by ``tracking.init_timeout_s``.
        on_error: ``stop`` after the first step that fails, or ``continue`` if all that it does is
            measure; the run fails all the same. Steps that clean are run after any failure.
    """

    isolate: bool = True
    idle_timeout_s: float = 60.0
    shutdown_timeout_s: float = 60.0
    sample_peaks: bool = True
    heartbeat_s: float | None = 30.0
    phase_timeout_s: float | None = None
    phase_timeouts: dict[str, float] = field(default_factory=dict)
    run_timeout_s: float | None = None
    on_error: str = STOP

    def __post_init__(self) -> None:
        _check_choice("runner.on_error", self.on_error, STOP, CONTINUE)
        limits = {"phase_timeout_s": self.phase_timeout_s, "run_timeout_s": self.run_timeout_s}
        limits |= {f"phase_timeouts.{step}": limit for step, limit in self.phase_timeouts.items()}
        for name, limit in limits.items():
            _check_seconds(f"runner.{name}", limit)
            if limit is not None and not self.isolate:
                raise InputError(
                    f"runner.{name} is {limit:g}, but runner.isolate is false: only a process of "
                    "its own can be ended; leave the limit out"
                )
        _check_at_least(1, "runner.heartbeat_s", self.heartbeat_s)
        _check_seconds("runner.idle_timeout_s", self.idle_timeout_s)
        _check_seconds("runner.shutdown_timeout_s", self.shutdown_timeout_s)


@dataclass
class PlanConfig:
    """The byte plan.

    Attributes:
        enforce: refuse a run that cannot fit, and fail one whose plan was wrong.
        allowance_bytes: bytes over all devices by which the total after a phase may differ from the
            planned one. It is for what a run does not plan: compiled programs, the sampler's and
            the runtime's small buffers. Parameters, KV cache and slots have none.
        format: how ``kvpipe plan`` prints.
        target: what ``kvpipe plan`` plans for: ``cpu`` (this host), a chip and its topology, e.g.
            ``v5e:2x2x1``, or an accelerator type, e.g. ``v4-32``; None is ``cpu`` for ``engine.device=cpu`` and ``v4:2x2x1``, a v4-8, for
            ``tpu``.
        file: where ``kvpipe plan`` writes instead of to stdout.
        compile: compile the engine's prefill and decode step for the TPU that is planned for, and
            add their code and temporaries; takes about half a minute the first time.
        prompt_tokens: length of the prompt for ``compile``, in tokens; None estimates it from the
            prompt's bytes. The engine pads it to 64, 128, 256, … tokens.
    """

    enforce: bool = True
    allowance_bytes: int = 512 * 1024**2
    format: PlanFormat = PlanFormat.table
    target: str | None = None
    file: str | None = None
    compile: bool = False
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_at_least(0, "plan.allowance_bytes", self.allowance_bytes)
        _check_at_least(1, "plan.prompt_tokens", self.prompt_tokens)


@dataclass
class ComparePlansConfig:
    """What ``kvpipe compare-plans`` compares.

    Attributes:
        base: git revision before the change; None is ``HEAD``, or without ``head`` and with
            ``overrides`` the files as they are.
        head: git revision after the change; None is the files as they are.
        overrides: overrides that only the plan after the change has, each in quotes:
            ``'compare_plans.overrides=["engine.page_size=64"]'``.
        budget_bytes: bytes that the peak of a device may grow by.
    """

    base: str | None = None
    head: str | None = None
    overrides: list[str] = field(default_factory=list)
    budget_bytes: int = 0

    def __post_init__(self) -> None:
        _check_at_least(0, "compare_plans.budget_bytes", self.budget_bytes)
        _check_texts("compare_plans.overrides", self.overrides)


@dataclass
class CompareConfig:
    """How ``kvpipe compare`` compares runs: each further one is held against the first.

    Attributes:
        format: how it prints.
        file: where it writes instead of to stdout.
        budget_bytes: bytes over all devices by which parameters, KV cache or a slot may grow.
        allowance_bytes: bytes by which what no plan holds to the byte may grow: the total, the
            programs, other arrays, the peak inside a phase.
        outputs: whether another output is beyond what may differ.
        duration_factor: how many times as long a phase may take; None is any. Phases of less than
            0.1 s do not count.
        compilations: programs that a phase may compile more; None is any.
    """

    format: CompareFormat = CompareFormat.markdown
    file: str | None = None
    budget_bytes: int = 0
    allowance_bytes: int = 512 * 1024**2
    outputs: bool = True
    duration_factor: float | None = None
    compilations: int | None = None

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "allowance_bytes", "duration_factor", "compilations"):
            _check_at_least(0, f"compare.{name}", getattr(self, name))


@dataclass
class ReportConfig:
    """Where ``kvpipe report`` writes.

    Attributes:
        dir: directory for ``report.html`` and ``timeline.png``; None is that of the records.
    """

    dir: str | None = None


@dataclass
class SweepConfig:
    """How the jobs of a sweep (``-m``) are carried out.

    Attributes:
        resume: a job that an earlier sweep has carried out takes its records over instead of
            running: same config (but for tracking and output), same versions, and it passed. The
            sweeps beside this one's directory are looked through, and this one's own.
    """

    resume: bool = False


@dataclass
class DescribeConfig:
    """What ``kvpipe phases`` prints.

    Attributes:
        phase: name of the one phase to print; None prints all. ``kvpipe phases NAME`` sets it.
        format: how.
    """

    phase: str | None = None
    format: PlanFormat = PlanFormat.table


@dataclass
class Kvpipe:
    """The whole configuration.

    Attributes:
        experiment: name of the experiment, for records and the run directory.
        pipeline: the steps, in order.
        phases: step name → options; ``use`` names the file in ``phases/``.
        repeat: a stretch of the pipeline to repeat; its steps of cycle k are called ``name#k``.
        output: what stdout shows.
        cache_dir: where generated checkpoints are kept; None is ``$XDG_CACHE_HOME/kvpipe``.
    """

    experiment: str = "tiny"
    pipeline: list[str] = MISSING
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    repeat: RepeatConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    compare_plans: ComparePlansConfig = field(default_factory=ComparePlansConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    output: OutputFormat = OutputFormat.auto
    cache_dir: str | None = None


def _check_choice(key: str, value: str, *valid: str) -> None:
    if value not in valid:
        raise InputError(f"{key} is {value!r}; {nearest(value, valid)}")


def _check_at_least(least: int, key: str, value: Any) -> None:
    """Refuse a number below ``least``, and what is not finite; None and MISSING are no numbers."""
    if isinstance(value, int | float) and not least <= value < math.inf:
        raise InputError(f"{key} is {value}, it has to be at least {least}")


def _check_texts(key: str, values: list[Any]) -> None:
    """Refuse an item that is no text: OmegaConf lets a list pass as an item of list[str]."""
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{key}: {value!r} is of type {type(value).__name__}, not str")


def _check_seconds(key: str, value: float | None) -> None:
    """Refuse a time of no seconds, or of no end; None is no time."""
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"{key} is {value}, it has to be more than 0 seconds")


def schema() -> DictConfig:
    """Return the schema that configs are merged into.

    ``phases`` and ``runner.phase_timeouts`` take new keys without a ``+``: which steps there are,
    and their options, is checked when the steps are built.
    """
    node = OmegaConf.structured(Kvpipe)
    OmegaConf.set_struct(node.phases, False)
    OmegaConf.set_struct(node.runner.phase_timeouts, False)
    return node


def to_plain(config: Any) -> dict[str, Any]:
    """Return a composed config as plain dicts, lists and scalars, everything resolved.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a value is missing or cannot be resolved.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> Kvpipe:
    """Return the typed config that :func:`to_plain` wrote, with every value checked again."""
    config = OmegaConf.to_object(OmegaConf.unsafe_merge(OmegaConf.structured(Kvpipe), plain))
    assert isinstance(config, Kvpipe)
    return config
