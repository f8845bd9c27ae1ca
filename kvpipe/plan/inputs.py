"""Check config, model files and prompt before anything is started, without jax.

:func:`check_inputs` is the one check of a model for every verb. A run makes it again in the worker,
once the model is generated or downloaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpipe.checkpoints import model_dir
from kvpipe.checkpoints.model_check import Needs, check_directory
from kvpipe.checkpoints.model_config import Model
from kvpipe.config.examples import read_examples
from kvpipe.config.jax_environment import device_total
from kvpipe.config.prompt import read_prompt
from kvpipe.config.prompts import Prompt, read_prompts
from kvpipe.config.schema import EngineConfig, Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline.facts import ENGINE, own_kv_tokens
from kvpipe.pipeline.ledger import TRAIN_STEP
from kvpipe.plan import policy_inputs
from kvpipe.plan.fold import PlannedStep, kv_capacities
from kvpipe.plan.pages import whole_pages
from kvpipe.units import counted

# Tokens that the engine keeps free in the shorter of context and KV cache: after the prompt alone
# (max_req_input_len), and after the prompt and all new tokens.
_BESIDE_PROMPT, _BESIDE_ALL = 7, 2
_HALF_WAY = 3
"""Least number of new tokens with which a sample is half-way after a step of decoding."""
# Of its KV cache, with a page beside the capacity: their numbers are of 32 bits.
_MOST_SLOTS = (1 << 31) - 1


def check_inputs(
    config: Kvpipe,
    planned: Sequence[PlannedStep],
    directory: Path | None = None,
    whole: bool = True,
) -> None:
    """Refuse a model, a mesh, a capacity or a request that the engine cannot have.

    Without the model's ``directory``, what is known of it on this machine is checked. With
    ``whole`` it must have all that the steps need, as for a run.

    Raises:
        InputError: naming what is wrong.
    """
    needs = Needs(
        weights=any(item.effect.reads_weights for item in planned),
        tokenizer=any(ENGINE in item.effect.adds for item in planned),
    )
    if directory is not None:
        model = check_directory(model_dir.key_of(config.model), directory, needs)
    else:
        model = model_dir.check_known(config, needs, whole)
        directory = model_dir.known_directory(config)
    engine = config.engine
    devices = device_total(engine)
    if model is not None and devices is not None:
        check_split(engine, model, devices)
    for tokens in (engine.max_total_tokens, *sorted(kv_capacities(planned))):
        _check_capacity(tokens, engine.page_size)
    context = _context(engine, model)
    if any(TRAIN_STEP in item.effect.runs for item in planned) and config.trainer.reads_data:
        _check_examples(config, directory)
    policy_inputs.check_policy(config, planned)
    _check_losses(config, planned)
    longest = _longest_prompts(config, planned, directory)
    scored = {began.step.step for _, began in policy_inputs.scored(planned)}
    for item in planned:
        if item.effect.new_tokens:
            _check_request(item, *_limit(item, engine, context), longest[item.effect.rolls_out])
        if item.effect.pauses_after:
            _check_pause(item, len(read_prompts(config.prompts)))
        in_batch = config.trainer.rewarded or item.step.step in scored
        if item.effect.rolls_out and in_batch:
            _check_row(item, config.trainer.length, longest[True])


def _check_losses(config: Kvpipe, planned: Sequence[PlannedStep]) -> None:
    for item in planned:
        if item.effect.reads_losses and not config.trainer.learns:
            raise InputError(
                f"trainer.loss is {config.trainer.loss!r}, which has no loss, but step "
                f"{item.step.step!r} reads losses; leave the step out, or set trainer.loss=sft"
            )


def check_split(engine: EngineConfig, model: Model, devices: int) -> None:
    """Refuse a tensor-parallel size over which the model cannot be divided.

    Raises:
        InputError: with the largest size that would fit the model and the devices.
    """
    tp_size = engine.tp_size or devices // engine.dp_size
    why = model.undivided_by(tp_size) if tp_size else f"there are {devices} devices"
    if not why:
        return
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    most = max(size for size in sizes if not model.undivided_by(size))
    raise InputError(
        f"engine.tp_size is {tp_size}, but {why}; {devices} devices take engine.tp_size={most} "
        f"engine.dp_size={devices // most}"
    )


def least_capacity(page_size: int) -> int:
    """Return the smallest KV cache that holds a request, in tokens: whole pages of it."""
    return (_BESIDE_PROMPT // page_size + 1) * page_size


def _check_capacity(tokens: int, page_size: int) -> None:
    if whole_pages(tokens, page_size) <= _BESIDE_PROMPT:
        raise InputError(
            f"engine.max_total_tokens: a KV cache of {tokens} tokens holds no request in whole pages "
            f"of engine.page_size={page_size}; it needs more than {_BESIDE_PROMPT} tokens and a page"
        )
    if tokens + page_size > _MOST_SLOTS:
        raise InputError(
            f"engine.max_total_tokens: a KV cache of {tokens} tokens has more slots than the engine "
            f"counts in 32 bits; it must be at most {_MOST_SLOTS - page_size} tokens"
        )


def _context(engine: EngineConfig, model: Model | None) -> int | None:
    """Return the longest sequence of the engine in tokens; None if it is not known."""
    own, asked = model and model.context, engine.context_length
    if own is not None and asked is not None and asked > own:
        raise InputError(
            f"engine.context_length is {asked}, but the model has {own} positions "
            "(max_position_embeddings)"
        )
    return asked or own


@dataclass
class _Longest:
    """The longest prompt, in tokens; counted only if its upper bound exceeds a limit.

    Attributes:
        what: the prompt in messages.
        most: upper bound of its tokens, one per byte.
        count: returns the number of its tokens; None if no tokenizer is known.
    """

    what: str
    most: int
    count: Callable[[], int | None] | None

    def exact(self) -> int:
        """Return its number of tokens, or an upper bound if there is no tokenizer."""
        if self.count is not None:
            self.most, self.count = self.count() or 1, None
        return self.most


def _longest_prompts(
    config: Kvpipe, planned: Sequence[PlannedStep], directory: Path | None
) -> dict[bool, _Longest]:
    """Return the prompt (False), and the longest of a rollout's prompts (True) if there is a rollout.

    Raises:
        InputError: one cannot be read.
    """
    text = read_prompt(config.prompt)
    one = [Prompt("", text)]
    longest = {
        False: _Longest("prompt: it has", _bound(one), lambda: _count(config, one, directory))
    }
    if any(item.effect.rolls_out for item in planned):
        prompts = read_prompts(config.prompts)
        chats = [prompt for prompt in prompts if prompt.text is None]
        found = _Longest(
            "prompts: the longest has",
            _bound(prompts),
            lambda: _count(config, prompts, directory),
        )
        if chats:  # the template adds what it likes
            found.exact()
        longest[True] = found
    return longest


def _bound(prompts: Sequence[Prompt]) -> int:
    return 1 + max(len((prompt.text or "").encode()) for prompt in prompts)


def _check_request(item: PlannedStep, limit: int, key: str, longest: _Longest) -> None:
    """Refuse a prompt, or a number of new tokens, beyond the context or the KV cache of a step."""
    new, step = item.effect.new_tokens, f"step {item.step.step!r}"
    most = longest.most
    if most > limit - _BESIDE_PROMPT or most + new > limit - _BESIDE_ALL:
        most = longest.exact()
    if most > limit - _BESIDE_PROMPT:
        raise InputError(
            f"{longest.what} {most:,} tokens, but {key} is {limit:,}, which takes prompts of at "
            f"most {limit - _BESIDE_PROMPT:,} ({step})"
        )
    if most + new > limit - _BESIDE_ALL:
        raise InputError(
            f"{step} asks for {new:,} tokens (sampling.max_new_tokens, or its own option) after "
            f"a prompt of {most:,}, but {key} is {limit:,}, which leaves "
            f"{limit - _BESIDE_ALL - most:,}"
        )


def _check_pause(item: PlannedStep, prompts: int) -> None:
    """Refuse a pause at which no sample can be unfinished."""
    effect, step = item.effect, f"step {item.step.step!r}"
    # A sample has two tokens after its first step of decoding.
    if effect.new_tokens < _HALF_WAY:
        raise InputError(
            f"{step} pauses after a step of decoding with samples half-way, but they have at most "
            f"{counted(effect.new_tokens, 'token')} (sampling.max_new_tokens, or its own option); it "
            f"needs at least {_HALF_WAY}"
        )
    total = prompts * effect.samples * effect.new_tokens
    if effect.pauses_after >= total:
        raise InputError(
            f"{step} pauses after {effect.pauses_after:,} tokens (pause_after_tokens), but its samples "
            f"have at most {total:,} together ({counted(prompts, 'prompt')}, {effect.samples} of each, "
            f"{effect.new_tokens} tokens), and then none is half-way; it takes at most {total - 1:,}"
        )


def _check_row(item: PlannedStep, length: int, longest: _Longest) -> None:
    """Refuse samples that are, with their prompts, longer than a row of a batch."""
    new = item.effect.new_tokens
    if longest.most + new > length and longest.exact() + new > length:
        raise InputError(
            f"step {item.step.step!r} asks for {new:,} tokens (sampling.max_new_tokens, or its own "
            f"option) after a prompt of {longest.most:,}, but trainer.length is {length:,}; set "
            f"trainer.length={longest.most + new}"
        )


def _check_examples(config: Kvpipe, directory: Path | None) -> None:
    """Refuse an example to learn from that is longer than a row of a batch.

    It has at most one token a byte, and one for each end of the text; so it is counted only if the
    bound is too large.
    """
    length = config.trainer.length
    for number, example in enumerate(read_examples(config.trainer), start=1):
        parts = (example.prompt, example.response)
        if sum(len(part.encode()) for part in parts) + 2 <= length:
            continue
        counts = [_count(config, [Prompt("", part)], directory) for part in parts]
        found = sum(count or 0 for count in counts) + 1
        if found > length:
            raise InputError(
                f"trainer.data: example {number} has {found:,} tokens with the end of its response, "
                f"but trainer.length is {length:,}"
            )


def _limit(item: PlannedStep, engine: EngineConfig, context: int | None) -> tuple[int, str]:
    """Return the longest request of a step in tokens, and the key that limits it."""
    own = own_kv_tokens(item.facts)
    capacity = whole_pages(own or engine.max_total_tokens, engine.page_size)
    key = "the rebuilt KV cache" if own else "engine.max_total_tokens"
    if context is None or capacity < context:
        return capacity, key
    return context, "engine.context_length" if engine.context_length else "the model's context"


def _count(config: Kvpipe, prompts: Sequence[Prompt], directory: Path | None) -> int | None:
    """Return the tokens of the longest prompt; None if no tokenizer is known."""
    from kvpipe.checkpoints import tokenizer

    if any(prompt.text is None for prompt in prompts) and directory is not None:
        ids = tokenizer.prompt_ids(prompts, tokenizer.open_tokenizer(directory))
        return max(map(len, ids))
    texts = [prompt.text for prompt in prompts if prompt.text is not None]
    if directory is not None:
        return tokenizer.count_tokens(texts, directory)
    if config.model.path is None and config.model.generate is not None:
        from kvpipe.checkpoints import tiny

        own = tiny.tokenizer(config.model.generate)
        tokenizer.refuse_chats(prompts, own)
        return tokenizer.count_with(own, texts)
    return None
