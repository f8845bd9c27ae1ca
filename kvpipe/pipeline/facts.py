"""The vocabulary of states that phases need, add and remove, and the pools that follow from them.

A fact is a short string that is true or false at a point of the pipeline. Phases refer to each other
only through facts, so that no phase needs to know another phase.
"""

from dataclasses import dataclass

from kvpipe.pipeline.ledger import KV, PARAMS, TRAINER_SETS, KvTokens, PoolSize, Size, slot_pool
from kvpipe.suggest import nearest

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
IN_FLIGHT = "in_flight"
IN_FLIGHT_STALE = "in_flight:stale"
TRAINER_LIVE = "trainer:live"
TRAINER_OFFLOADED = "trainer:offloaded"
TRAINER_AHEAD = "trainer:ahead"
SAMPLES_REWARDED = "samples:rewarded"

PREFIX_CACHE = (KV_WRITTEN, KV_STALE, KV_OFFLOADED)
"""Facts about the contents of the prefix cache; a flush removes all of them."""


def stale(before: frozenset[str]) -> tuple[str, ...]:
    """Return the facts that other weights add to ``before`` if the prefix cache is not flushed."""
    cache = (KV_STALE,) if KV_WRITTEN in before else ()
    return (*cache, IN_FLIGHT_STALE) if IN_FLIGHT in before else cache


def flushed(before: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the facts that other weights add and remove that flush the prefix cache themselves.

    They do not flush it while requests are in flight, whose tokens are in it.
    """
    return (stale(before), ()) if IN_FLIGHT in before else ((), PREFIX_CACHE)


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


def shared_in(facts: frozenset[str]) -> tuple[str, ...]:
    """Return those of ``facts`` that say which slots share their arrays with the engine."""
    return tuple(sorted(fact for fact in facts if fact.startswith(shared(""))))


def pools(facts: frozenset[str]) -> dict[str, PoolSize]:
    """Return the size of each pool that follows from ``facts``; all others hold nothing."""
    held: dict[str, PoolSize] = {}
    if WEIGHTS_LIVE in facts:
        held[PARAMS] = Size.PARAMS
    if KV_LIVE in facts:
        tokens = own_kv_tokens(facts)
        held[KV] = KvTokens(tokens) if tokens else Size.KV
    names = sorted(fact.removeprefix(slot("")) for fact in facts if fact.startswith(slot("")))
    held |= {slot_pool(name): Size.PARAMS for name in names if shared(name) not in facts}
    if TRAINER_LIVE in facts:
        held |= {slot_pool(size): size for size in TRAINER_SETS}
    return held


def changed_pools(before: frozenset[str], after: frozenset[str]) -> dict[str, PoolSize]:
    """Return the size of each pool that a change of facts changes."""
    if before == after:
        return {}
    was, now = pools(before), pools(after)
    return {
        pool: now.get(pool, Size.NOTHING)
        for pool in {**was, **now}
        if was.get(pool) != now.get(pool)
    }


def output(step: str) -> str:
    """Fact: the step ``step`` has generated text."""
    return f"output:{step}"


def rollout(step: str) -> str:
    """Fact: the step ``step`` has made a rollout."""
    return f"rollout:{step}"


def mixed(step: str) -> str:
    """Fact: further tokens of the rollout ``step`` follow upon a KV cache that other weights filled."""
    return f"mixed:{step}"


def trained(step: str) -> str:
    """Fact: the step ``step`` has trained."""
    return f"trained:{step}"


def is_history(fact: str) -> bool:
    """Whether a fact records that a step has run; their number grows with that of the steps."""
    return fact.startswith((output(""), rollout(""), mixed(""), trained("")))


@dataclass(frozen=True)
class Meaning:
    """A fact in words, and the remedies if a needed one is absent or a forbidden one is present."""

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
    IN_FLIGHT: Meaning(
        "a paused rollout with requests in flight",
        "put 'rollout_paused' before it",
        "put 'rollout_resumed' between",
    ),
    IN_FLIGHT_STALE: Meaning(
        "requests in flight whose first tokens other weights made",
        "put a swap or a sync between the pause and it, or leave out new_weights",
        "set new_weights=true for this step, and each sample says which weights made which tokens",
    ),
    WEIGHTS_LIVE: Meaning(
        "the engine's weights on the devices",
        "put 'weights_restored' or a swap between (a swap needs none with probe_tokens=0)",
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
        "trained weights that are not synced to the engine",
        "put 'train_step' before it",
        "put 'weights_synced' between, or set unsynced=true for this step",
    ),
    SAMPLES_REWARDED: Meaning(
        "rewarded samples of the engine's weights",
        "put 'rollout' and 'rewarded' before it, after the last 'weights_synced'",
    ),
}


def remedy(fact: str, before: frozenset[str]) -> str:
    """Return the remedy if a step needs ``fact``, which is not among the facts ``before`` it."""
    if fact == KV_LIVE and KV_OFFLOADED in before:
        return "put 'kv_cache_restored' between"
    return meaning(fact).if_missing


def meaning(fact: str) -> Meaning:
    """Return the meaning of ``fact``.

    Raises:
        ValueError: it is not in the vocabulary.
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
    if kind == "rollout":
        return Meaning(f"the rollout of step {name!r}", f"put step {name!r} before it")
    if kind == "mixed":
        what = f"tokens of step {name!r} that follow upon what other weights have computed"
        return Meaning(
            what, f"put step {name!r} before it", f"set recompute=true for step {name!r}"
        )
    if kind == "kv_tokens":
        what = f"a KV cache of {name} tokens, whatever engine.max_total_tokens is"
        return Meaning(what, f"rebuild the KV cache with max_total_tokens={name} before it")
    if kind == "trained":
        return Meaning(f"the training of step {name!r}", f"put step {name!r} before it")
    if kind == "shared":
        what = f"an engine on the arrays of slot {name!r}"
        return Meaning(what, f"swap slot {name!r} in", f"release slot {name!r} before it")
    if fact not in _MEANINGS:
        raise ValueError(f"there is no fact {fact!r}; {nearest(fact, _MEANINGS)}")
    return _MEANINGS[fact]
