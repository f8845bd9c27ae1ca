"""Rollouts on the real engine in float32: batches, seeds, ends, log-probabilities, the sampler."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.config.schema import SamplingConfig
from kvpipe.errors import EngineError
from kvpipe.pipeline.rollout import (
    Request,
    Rollout,
    rollout_continued,
    rollout_proven,
    same_rollout,
    seed_of,
)
from tests.conftest import IDLE_TIMEOUT_S, engine_config, greedy
from tests.golden.answers import comparable, golden

WARM = SamplingConfig(max_new_tokens=4, temperature=5.0, ignore_eos=True, seed=1)
PROMPTS = (("Hello", "a"), ("The KV cache is dropped and rebuilt.", "b"))


@pytest.fixture(scope="module")
def engine(four_devices: None, tiny_dir: Path) -> Iterator[Any]:
    """An engine with the golden model's weights in float32."""
    from kvpipe.engine import sglang, weights

    shared = sglang.start(engine_config(dtype="float32"), tiny_dir, IDLE_TIMEOUT_S)
    weights.stream(shared, open_checkpoint(tiny_dir))
    yield shared
    shared.shut_down()


@pytest.fixture
def flushed(engine: Any) -> Any:
    """The engine with an empty prefix cache."""
    engine.flush()
    return engine


def requests(engine: Any, n: int, seed: int | None) -> list[Request]:
    """Return requests for ``n`` samples of each prompt."""
    encode = engine.engine.tokenizer_manager.tokenizer.encode
    return [
        Request(name, i, tuple(encode(text)), seed_of(seed, name, i))
        for text, name in PROMPTS
        for i in range(n)
    ]


def roll_out(engine: Any, sampling: SamplingConfig, n: int = 3) -> Rollout:
    from kvpipe.engine import rollout

    return rollout.roll_out(engine, requests(engine, n, sampling.seed), sampling)


def ids(rollout: Rollout) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in rollout.samples]


def batches(engine: Any, patch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that gets the requests of each batch, by their places in the rollout."""
    run_batch, found = engine.scheduler.run_batch, []

    def noted(batch: Any) -> Any:
        found.append([request.rid.split("/")[2] for request in batch.reqs])
        return run_batch(batch)

    patch.setattr(engine.scheduler, "run_batch", noted)
    return found


def in_portions(engine: Any, patch: pytest.MonkeyPatch, sizes: Sequence[int]) -> None:
    """Let the scheduler receive requests in portions of these sizes, with rounds without any."""
    receive, kept, left = engine.scheduler.recv_requests, [], list(sizes)

    def received() -> Any:
        kept.extend(receive() or ())
        if left and len(kept) >= left[0]:
            portion, kept[:] = kept[: left[0]], kept[left.pop(0) :]
            return portion
        return []

    # On the scheduler's thread: the method in use may be about to receive, and would keep a portion.
    engine.on_scheduler.call(lambda: patch.setattr(engine.scheduler, "recv_requests", received))


def test_a_rollout_is_the_same_however_its_requests_arrive(flushed: Any) -> None:
    found = []
    for sizes in ([6], [1, 2, 3], [3, 1, 1, 1]):
        flushed.flush()
        with pytest.MonkeyPatch.context() as patch:
            in_portions(flushed, patch, sizes)
            composed = batches(flushed, patch)
            found.append((roll_out(flushed, WARM), composed))
    (first, composed), *others = found
    assert len(composed) > 8
    for later, its_batches in others:
        assert its_batches == composed
        assert same_rollout("same_rollout", first, later).passed


def test_all_hosts_are_ready_before_the_first_sends_a_request(
    flushed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another host lacks the rollout of a request, or does not count its first step."""
    from kvpipe.engine import multihost
    from kvpipe.engine.rollout import _hooks

    met = []

    def each(value: Any) -> list[Any]:
        met.append((len(_hooks(flushed)._held), flushed.scheduler.forward_ct))
        return [value]

    monkeypatch.setattr(multihost, "each", each)
    steps = flushed.scheduler.forward_ct
    generated = flushed.generate("Hello", greedy(2)).forward_steps
    roll_out(flushed, WARM)
    assert met == [(0, steps), (1, steps + generated)]
    assert generated > 0 == len(_hooks(flushed)._held)


def test_samples_are_distinct_the_same_with_the_same_seed_and_others_with_another(
    flushed: Any,
) -> None:
    first = roll_out(flushed, WARM)
    flushed.flush()
    other = roll_out(flushed, replace(WARM, seed=2))
    assert len(set(ids(first)) | set(ids(other))) == 12
    flushed.flush()
    again = roll_out(flushed, WARM)
    assert same_rollout("same_rollout", first, again).passed
    assert not same_rollout("same_rollout", first, other).passed


def test_a_sample_depends_on_its_own_seed_and_not_on_the_other_requests(flushed: Any) -> None:
    """Alone it has a batch of its own, whose arithmetic may differ in the last bits."""
    from kvpipe.engine import rollout

    together = roll_out(flushed, WARM)
    one = rollout.roll_out(flushed, [requests(flushed, 3, WARM.seed)[4]], WARM)
    assert ids(one) == [ids(together)[4]]


def test_greedy_ids_of_a_batch_are_those_of_each_prompt_alone(flushed: Any) -> None:
    batch = roll_out(flushed, greedy(8), n=1)
    flushed.flush()
    alone = [flushed.generate(text, greedy(8)).token_ids for text, _ in PROMPTS]
    assert ids(batch) == alone


def test_log_probabilities_are_those_of_transformers(flushed: Any) -> None:
    """Up to the golden file's 5 decimals and what float32 on other kernels leaves."""
    answers = golden("tiny_float32")["answers"]
    count = min(len(comparable(answer)[:16]) for answer in answers)
    batch = roll_out(flushed, greedy(count), n=1)
    for answer, sample in zip(answers, batch.samples, strict=True):
        assert list(sample.token_ids) == answer["output_ids"][:count]
        error = np.abs(np.array(sample.logprobs) - answer["logprobs"][:count])
        assert error.max() < 2e-4


def test_log_probabilities_do_not_depend_on_temperature_and_filters(flushed: Any) -> None:
    """The trainer's ratio needs those of the model itself."""
    cold = roll_out(flushed, greedy(4), n=1)
    flushed.flush()
    hot = replace(WARM, temperature=3.0, top_k=1)
    filtered = roll_out(flushed, hot, n=1)
    assert same_rollout("same_rollout", cold, filtered).passed


def test_a_stop_text_and_a_stop_id_end_a_sample_and_only_it(flushed: Any) -> None:
    tokenizer = flushed.engine.tokenizer_manager.tokenizer
    whole = roll_out(flushed, greedy(8), n=1)
    stop_id = whole.samples[0].token_ids[3]
    flushed.flush()
    by_id = roll_out(flushed, replace(greedy(8), stop_token_ids=[stop_id], ignore_eos=False), n=1)
    assert by_id.samples[0].text == tokenizer.decode(whole.samples[0].token_ids[:3])
    text = tokenizer.decode([stop_id])
    flushed.flush()
    by_text = roll_out(flushed, replace(greedy(8), stop=[text], ignore_eos=False), n=1)
    for ended in (by_id, by_text):
        assert ended.samples[0].token_ids == whole.samples[0].token_ids[:4]
        assert len(ended.samples[0].logprobs) == 4
        assert all(check.passed for check in rollout_proven(ended, 8))
        assert [sample.finish_reason for sample in ended.samples] == ["stop", "length"]
        assert ended.samples[1].token_ids == whole.samples[1].token_ids


def test_a_rollout_counts_steps_and_cached_tokens_and_knows_its_weights(flushed: Any) -> None:
    first = roll_out(flushed, WARM)
    again = roll_out(flushed, WARM)
    assert first.cached_tokens < again.cached_tokens < again.prompt_tokens
    assert again.forward_steps >= 4
    assert first.weights_digest == again.weights_digest == flushed.proof.whole
    assert [*first.cache_digests, *again.cache_digests] == [flushed.proof.whole]
    assert 0 < first.samples[0].first_token_s < first.duration_s


def test_a_generate_beside_a_rollout_is_left_alone_and_nothing_is_kept(flushed: Any) -> None:
    output = flushed.generate("Hello", greedy(4))
    assert len(output.token_ids) == 4
    roll_out(flushed, WARM)
    assert flushed.rollouts._held == {}


def test_a_dropped_cache_refuses_a_rollout_and_a_later_one_runs(flushed: Any) -> None:
    from kvpipe.engine import kv_cache

    capacity = flushed.max_total_tokens
    before = roll_out(flushed, WARM)
    flushed.flush()
    kv_cache.drop(flushed)
    with pytest.raises(EngineError, match="the engine cannot generate"):
        roll_out(flushed, WARM)
    kv_cache.rebuild(flushed, capacity)
    assert same_rollout("same_rollout", before, roll_out(flushed, WARM)).passed


def paused(engine: Any, tokens: int) -> Any:
    from kvpipe.engine import rollout

    return rollout.pause(engine, requests(engine, 3, WARM.seed), WARM, tokens)


def resumed(engine: Any, in_flight: Any) -> Rollout:
    from kvpipe.engine import rollout

    return rollout.resume(engine, in_flight)


def through_the_host(engine: Any) -> None:
    """Offload the KV cache and restore it."""
    from kvpipe.engine import kv_cache

    kv_cache.restore(engine, kv_cache.offload(engine)[1])


def equal_after_a_pause(
    engine: Any, uninterrupted: tuple[Rollout, list[list[str]]], tokens: int
) -> None:
    """Pause after so many tokens; assert that the rest is as in a rollout without a pause."""
    first, composed = uninterrupted
    engine.flush()
    with pytest.MonkeyPatch.context() as patch:
        its_batches = batches(engine, patch)
        in_flight = paused(engine, tokens)
        through_the_host(engine)
        later = resumed(engine, in_flight)
    at = in_flight.at_pause
    assert sum(at.tokens) >= tokens
    assert at.half_way > 0
    checks = [
        same_rollout("same_rollout", first, later),
        *at.checks(),
        *rollout_proven(later, WARM.max_new_tokens),
        *rollout_continued(later, new_weights=False),
    ]
    assert [check for check in checks if not check.passed] == [], tokens
    assert at.forward_steps + later.forward_steps == first.forward_steps
    assert its_batches == composed


@pytest.fixture
def uninterrupted(flushed: Any) -> tuple[Rollout, list[list[str]]]:
    """A rollout without a pause, and its batches."""
    with pytest.MonkeyPatch.context() as patch:
        composed = batches(flushed, patch)
        return roll_out(flushed, WARM), composed


def test_a_paused_rollout_goes_on_with_the_batches_ids_and_log_probabilities_of_one_without_a_pause(
    engine: Any, uninterrupted: Any
) -> None:
    """With requests that wait; and where two end and two others, with a known prompt, begin."""
    for tokens in (6, 15):
        equal_after_a_pause(engine, uninterrupted, tokens)


@pytest.mark.nightly(
    finds="a step between which and the next one a pause loses or changes something"
)
def test_a_rollout_may_be_paused_between_any_two_of_its_steps(
    engine: Any, uninterrupted: Any
) -> None:
    for tokens in range(1, 20, 2):  # a step adds two at least; in the last one of 24 all end
        equal_after_a_pause(engine, uninterrupted, tokens)


def test_requests_in_flight_keep_others_and_a_flush_away(flushed: Any) -> None:
    from kvpipe.engine import kv_cache

    in_flight = paused(flushed, 6)
    half_way = "a rollout is paused with requests half-way; resume it first"
    for act in (
        lambda: flushed.generate("Hello", greedy(4)),
        lambda: roll_out(flushed, WARM),
        lambda: paused(flushed, 6),
        flushed.flush,
    ):
        with pytest.raises(EngineError, match=half_way):
            act()
    with pytest.raises(EngineError, match="tokens of the KV cache are in use"):
        kv_cache.drop(flushed)
    kept = kv_cache.offload(flushed)[1]
    with pytest.raises(EngineError, match="its KV cache is offloaded; restore it first"):
        resumed(flushed, in_flight)
    kv_cache.restore(flushed, kept)
    assert len(resumed(flushed, in_flight).samples) == 6
    with pytest.raises(EngineError, match="no rollout is paused, so there is none to resume"):
        resumed(flushed, in_flight)


def test_a_pause_that_comes_too_late_is_refused_with_the_tokens_that_there_were(
    flushed: Any,
) -> None:
    with pytest.raises(EngineError) as raised:
        paused(flushed, 25)
    assert str(raised.value) == (
        "all 6 requests ended with 24 tokens, and none was unfinished at the pause after 25 "
        "(pause_after_tokens)"
    )
    flushed.wait_idle()
    assert roll_out(flushed, WARM).decode_tokens == 24


# The sampler alone, as the engine calls it.

SHARES = np.array([0.42, 0.25, 0.15, 0.1, 0.05, 0.03], np.float32)
MANY = 65_536


def chi_squared(counts: np.ndarray[Any, Any], shares: np.ndarray[Any, Any]) -> float:
    """Return chi-squared over its degrees of freedom."""
    expected = shares * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum() / (len(shares) - 1))


def drawn(sampler: Any, seeds: Any, positions: Any) -> np.ndarray[Any, Any]:
    """Return tokens drawn with the shares as probabilities, one for each seed and position."""
    import jax

    logits = np.broadcast_to(np.log(SHARES), (len(seeds), len(SHARES)))
    draw = jax.jit(sampler.multinomial_with_seed)
    return np.asarray(draw((logits, seeds, positions, None)))[:, 0]


def counts(tokens: np.ndarray[Any, Any], kinds: int = len(SHARES)) -> np.ndarray[Any, Any]:
    return np.bincount(tokens, minlength=kinds)


SEEDS, ONE = np.arange(MANY, dtype=np.int32), np.full(MANY, 77, np.int32)


@pytest.mark.parametrize(("seeds", "positions"), [(SEEDS, ONE), (ONE, SEEDS)])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(
    engine: Any, seeds: Any, positions: Any
) -> None:
    """At 5 degrees of freedom one draw in 1,000 is above 4.1; the seeds are fixed."""
    from sgl_jax.srt.layers import sampler

    assert chi_squared(counts(drawn(sampler, seeds, positions)), SHARES) < 4.1


def test_the_tokens_of_neighbouring_positions_and_seeds_are_independent(engine: Any) -> None:
    """At 35 degrees of freedom one draw in 1,000 is above 1.9."""
    from sgl_jax.srt.layers import sampler

    first = drawn(sampler, SEEDS, ONE)
    for other in (drawn(sampler, SEEDS, ONE + 1), drawn(sampler, SEEDS + 1, ONE)):
        pairs = counts(first * len(SHARES) + other, len(SHARES) ** 2)
        assert chi_squared(pairs, np.outer(SHARES, SHARES).ravel()) < 1.9


FILTERS = {
    "top_k": ({"top_ks": 2}, {0, 1}),
    "top_p": ({"top_ps": 0.6}, {0, 1}),
    "min_p": ({"min_ps": 0.6}, {0, 1}),
    "none": ({}, {0, 1, 2, 3, 4, 5}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_leaves_out_the_tokens_that_it_names_and_keeps_the_shares_of_the_rest(
    engine: Any, name: str
) -> None:
    """At a temperature of 2, at which a token's weight is the root of its probability.

    Top-p is of the probabilities at temperature 1, min-p of those at the temperature.
    """
    import jax
    from sgl_jax.srt.layers import sampler

    given, expected = FILTERS[name]
    options = {"top_ks": len(SHARES), "top_ps": 1.0, "min_ps": 0.0} | given
    draw = jax.jit(sampler.top_k_top_p_min_p_sampling_from_probs_jax)
    tokens = draw(
        (
            np.broadcast_to(np.log(SHARES), (MANY, len(SHARES))),
            None,
            *(np.full(MANY, options[key]) for key in ("top_ks", "top_ps", "min_ps")),
            ONE,
            np.full((MANY, 1), 2.0),
            SEEDS,
            np.asarray(options["min_ps"] > 0),
            jax.random.key(0),
        )
    )
    found = Counter(np.asarray(tokens).tolist())
    assert set(found) == expected
    kept = np.array(sorted(expected))
    shares = SHARES[kept] ** 0.5
    assert chi_squared(np.array([found[t] for t in kept]), shares / shares.sum()) < 4.1
