"""The vocabulary of states that phases need, leave and take away.

A fact is a short string that is true or not at a point of the pipeline. Phases speak of each other
only through facts, so that no phase has to know another phase.
"""

from dataclasses import dataclass

WANDB = "wandb"
JAX = "jax"
ENGINE = "engine"
KV_LIVE = "kv:live"
KV_WRITTEN = "kv:written"
KV_OFFLOADED = "kv:offloaded"
KV_STALE = "kv:stale"
WEIGHTS_LIVE = "weights:live"
WEIGHTS_OFFLOADED = "weights:offloaded"
WEIGHTS_REAL = "weights:real"
TRAINER_LIVE = "trainer:live"
TRAINER_OFFLOADED = "trainer:offloaded"
TRAINER_AHEAD = "trainer:ahead"


def slot(name: str) -> str:
    """Fact: the device slot ``name`` holds a parameter set."""
    return f"slot:{name}"


def host(name: str) -> str:
    """Fact: the host holds the parameter tree ``name``."""
    return f"host:{name}"


def shared(name: str) -> str:
    """Fact: the engine computes with the very arrays of slot ``name``."""
    return f"shared:{name}"


def kv_tokens(tokens: int) -> str:
    """Fact: the KV cache has a capacity of ``tokens``, which is not ``engine.max_total_tokens``."""
    return f"kv_tokens:{tokens}"


def own_kv_tokens(facts: frozenset[str]) -> int | None:
    """Return the capacity of a KV cache that was rebuilt to one of its own, else None."""
    prefix = kv_tokens(0).removesuffix("0")
    return next((int(f.removeprefix(prefix)) for f in facts if f.startswith(prefix)), None)


def shared_slots(facts: frozenset[str]) -> list[str]:
    """Return the slots whose arrays the engine computes with."""
    prefix = shared("")
    return sorted(fact.removeprefix(prefix) for fact in facts if fact.startswith(prefix))


def output(step: str) -> str:
    """Fact: the step ``step`` has generated text."""
    return f"output:{step}"


def trained(step: str) -> str:
    """Fact: the step ``step`` has trained."""
    return f"trained:{step}"


@dataclass(frozen=True)
class Meaning:
    """What a fact means, for messages.

    Attributes:
        what: the fact in words.
        if_missing: what to do when a step needs it and it is not there.
        if_present: what to do when a step must not meet it and it is there.
    """

    what: str
    if_missing: str
    if_present: str = "leave the step out"


_MEANINGS = {
    WANDB: Meaning("a W&B run", "put 'wandb_init' first, or log_text=false"),
    JAX: Meaning("the JAX devices", "put 'jax_ready' before it"),
    ENGINE: Meaning("a started engine", "put 'engine_ready_dummy' before it"),
    KV_LIVE: Meaning("the KV cache on the devices", "put 'kv_cache_rebuilt' between"),
    KV_WRITTEN: Meaning(
        "a prefix cache in use", "put a generate before it", "flush the cache before it"
    ),
    KV_OFFLOADED: Meaning(
        "an offloaded KV cache",
        "put 'kv_cache_offloaded' before it",
        "restore it instead, or flush",
    ),
    KV_STALE: Meaning(
        "a prefix cache that other weights have filled",
        "",
        "flush the cache between the swap and the generate, or the ids are silently wrong",
    ),
    WEIGHTS_LIVE: Meaning(
        "the engine's weights on the devices",
        "put 'weights_restored' or a swap between",
    ),
    WEIGHTS_OFFLOADED: Meaning("offloaded weights", "put 'weights_offloaded' before it"),
    WEIGHTS_REAL: Meaning(
        "real weights in the engine",
        "put 'weights_swapped_from_mllm' before it, or set weights=any for this step",
    ),
    TRAINER_LIVE: Meaning(
        "a trainer on the devices",
        "put 'trainer_ready' before it, or 'trainer_restored' between",
    ),
    TRAINER_OFFLOADED: Meaning(
        "an offloaded trainer",
        "put 'trainer_offloaded' before it",
        "restore or drop it before",
    ),
    TRAINER_AHEAD: Meaning(
        "trained weights that the engine has not got",
        "put 'train_step' before it",
        "put 'weights_synced' between, or set unsynced=true for this step",
    ),
}


def meaning(fact: str) -> Meaning:
    """Return what ``fact`` means.

    Raises:
        KeyError: it is not in the vocabulary.
    """
    kind, _, name = fact.partition(":")
    if kind == "slot":
        what = f"a parameter set in slot {name!r}"
        return Meaning(what, f"build slot {name!r} before it", "give the slot another name")
    if kind == "host":
        what = f"the host parameters {name!r}"
        return Meaning(what, f"load {name!r} before it", "give them another name")
    if kind == "output":
        return Meaning(f"the output of step {name!r}", f"put step {name!r} before it")
    if kind == "kv_tokens":
        what = f"a KV cache of {name} tokens, whatever engine.max_total_tokens is"
        return Meaning(what, f"rebuild the KV cache with max_total_tokens={name} before it")
    if kind == "trained":
        return Meaning(f"the training of step {name!r}", f"put step {name!r} before it")
    if kind == "shared":
        what = f"an engine on the arrays of slot {name!r}"
        return Meaning(what, f"swap slot {name!r} in", f"release slot {name!r} before it")
    return _MEANINGS[fact]
