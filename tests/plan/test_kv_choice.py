"""``kv: auto``: the choice against every action planned by itself, without an engine."""

from dataclasses import dataclass, replace
from itertools import product

import pytest

from kvpipe.pipeline.kv_choice import DROP, KEEP, KV_ACTIONS, SHRINK, decided, open_actions
from kvpipe.pipeline.ledger import TRAIN_STEP, KvTokens, Size
from kvpipe.plan import fit, fold, kv_choice
from kvpipe.plan.targets import CPU, find_target
from kvpipe.records.run import Program, RunPlanned
from tests.helpers_config import build, compose_plain, config_of
from tests.refusal import refusal

GIB = 1 << 30
PAGE, TOKEN = 32_768, 18_432  # bytes of a token on one of four devices, as of Qwen2.5-3B
PARAMS = 1_600_000_000
TRAINERS = {"float32": 12_348_000_000, "bfloat16": 6_174_000_000}
ACTIVATIONS = 300_000_000  # of an example of a micro-batch
LEAF = 2_000_000_000  # the largest parameter, larger than real ones, so that it decides

CYCLE = kv_choice.ordered(config_of(compose_plain("pipeline=rl_cycle_auto", "repeat.times=1")))
STEPS = [item.step for item in CYCLE]


@dataclass(frozen=True)
class Machine:
    """Inputs of the plan of a cycle, with invented sizes similar to those of Qwen2.5-3B."""

    target: str
    hbm_bytes: int
    tokens: int
    trainer: str
    micro_batch: int

    @property
    def kv(self) -> fit.KvCapacity:
        return fit.KvCapacity(TOKEN * (self.tokens + PAGE), self.tokens, PAGE)

    def plan(self, steps) -> fold.Plan:
        third = TRAINERS[self.trainer] // 3
        sizes = {Size.PARAMS: PARAMS, Size.KV: self.kv.device_bytes}
        sizes |= dict.fromkeys((Size.PROGRAM, Size.TRAINER_PROGRAM), 0)
        sizes |= {size: third for size in Size if size.startswith("trainer_")}
        sizes |= {KvTokens(n): TOKEN * (n + PAGE) for n in fold.kv_capacities(steps)}
        sizes |= {Size.LEAF: LEAF, Size.DUMMY_START: 2 * PARAMS}
        temporary = ACTIVATIONS * self.micro_batch
        programs = (Program(TRAIN_STEP, 0, 0, 0, temporary, 0.0),) if self.micro_batch else ()
        given = {size: (n,) for size, n in sizes.items()}
        ledgers = fold.plan_ledgers(steps, given, devices=1)
        peaks = fold.plan_peaks(steps, ledgers, given)
        temporaries = [fit.temporaries(item, programs) for item in steps]
        found = fit.fit_of(steps, ledgers, self.hbm_bytes, self.kv, temporaries, peaks=peaks)
        phases = fold.planned_phases(steps, ledgers, peaks)
        record = RunPlanned(self.target, 1, "none", phases, found, programs)
        record = replace(record, warning=fit.warning(record))
        return fold.Plan(record, ledgers, tuple(steps))

    def chosen(self, planned=CYCLE, refuse=lambda steps: None) -> fold.Plan:
        return kv_choice.choose(planned, self.kv, self.plan, refuse)

    def by_itself(self, action, tokens=0) -> RunPlanned:
        return self.plan(fold.check_order(decided(STEPS, action, tokens))).record


ENGINE = replace(config_of(compose_plain()).engine, tp_size=None, virtual_devices=1)


def machine(target, tokens, trainer, micro_batch):
    # The host's memory is whatever it is: a run on it states a limit.
    hbm_bytes = 20 * GIB if target == CPU else find_target(target, ENGINE).hbm_bytes
    return Machine(target, hbm_bytes, tokens, trainer, micro_batch)


MACHINES = [
    machine(*each)
    for each in product(
        [CPU, "v4:2x2x1", "v5e:2x2x1", "v6e:2x2x1"],
        [4 * PAGE, 32 * PAGE],
        TRAINERS,
        [0, 1, 4, 10, 12],
    )
]


def has_place(record):
    return record.fit.fits and record.warning is None


def smallest(of: Machine) -> tuple[str | None, int]:
    """Return the smallest action with a place, and the capacity that it leaves, by trying all."""
    if has_place(of.by_itself(KEEP)):
        return KEEP, of.tokens
    for tokens in range(of.tokens - PAGE, 0, -PAGE):
        if has_place(of.by_itself(SHRINK, tokens)):
            return SHRINK, tokens
    return (DROP, 0) if has_place(of.by_itself(DROP)) else (None, 0)


def only_chosen(plan):
    (chosen,) = [each for each in plan.record.kv_actions if each.chosen]
    return chosen


@pytest.mark.parametrize("of", MACHINES, ids=str)
def test_the_smallest_action_that_fits_is_chosen_and_its_plan_is_the_runs(of):
    action, tokens = smallest(of)
    plan = of.chosen()
    chosen = only_chosen(plan)
    assert [each.action for each in plan.record.kv_actions] == list(KV_ACTIONS)
    if action is None:
        fits = [each for each in KV_ACTIONS if each != SHRINK and of.by_itself(each).fit.fits]
        assert chosen.action == [*fits, DROP][-1 if fits else 0]
        return
    assert (chosen.action, chosen.max_total_tokens, chosen.why_not) == (action, tokens, None)
    assert replace(plan.record, kv_actions=()) == of.by_itself(action, tokens)
    assert open_actions([item.step for item in plan.steps]) == ()


def test_every_action_is_the_smallest_on_one_of_these_machines_and_each_of_its_parts_matters():
    found = {of: smallest(of)[0] for of in MACHINES}
    assert set(found.values()) == {*KV_ACTIONS, None}
    for part in ("target", "tokens", "trainer", "micro_batch"):
        others = {}
        for of, action in found.items():
            same = tuple(value for key, value in vars(of).items() if key not in (part, "hbm_bytes"))
            others.setdefault(same, set()).add(action)
        assert max(map(len, others.values())) > 1, part


def test_the_smaller_cache_leaves_a_place_for_the_peak_of_a_step_beside_it():
    names = (*READY, "kv_cache_yielded", "trainer_ready", "streamed", "kv_cache_reclaimed")
    steps = auto(*names, streamed={"use": "weights_streamed", "probe_tokens": 0})
    of = replace(machine("v5e:2x2x1", 4 * PAGE, "bfloat16", 0), hbm_bytes=12_000_000_000)
    chosen = only_chosen(of.chosen(steps))
    assert (chosen.action, chosen.peak_phase) == (SHRINK, "streamed")

    def placed(tokens):
        decided_steps = decided([item.step for item in steps], SHRINK, tokens)
        return has_place(of.plan(fold.check_order(decided_steps)).record)

    most = chosen.max_total_tokens
    assert (placed(most), placed(most + PAGE)) == (True, False)


def test_an_action_says_what_it_costs_beside_the_others():
    of = machine("v5e:2x2x1", 4 * PAGE, "float32", 4)
    keep, shrink, drop = of.chosen().record.kv_actions
    whole = of.kv.device_bytes
    assert (keep.fits, keep.freed_bytes, keep.remade_bytes) == (False, 0, 0)
    assert keep.peak_bytes == of.by_itself(KEEP).peak.max_device_bytes + 4 * ACTIVATIONS
    assert keep.free_bytes == of.hbm_bytes - keep.peak_bytes < 0
    held = TOKEN * (shrink.max_total_tokens + PAGE)
    assert (shrink.chosen, shrink.freed_bytes, shrink.remade_bytes) == (
        True,
        whole - held,
        whole + held,
    )
    assert (drop.freed_bytes, drop.remade_bytes, drop.max_total_tokens) == (whole, whole, 0)
    assert "not possible" not in "".join(kv_choice.described([keep, shrink, drop]))


def auto(*names, **options):
    """Return the steps of a pipeline with options, as they are ordered before the choice."""
    config = config_of(compose_plain("engine.page_size=1", "engine.max_total_tokens=131072"))
    return kv_choice.ordered(replace(config, pipeline=list(names), phases=options))


READY = ("jax_ready", "engine_ready_dummy")
GENERATE = {"use": "generate", "weights": "any"}


def test_prefixes_count_as_lost_only_if_a_kept_cache_would_still_have_them():
    cycle = (*READY, "before", "kv_cache_yielded", "trainer_ready", "kv_cache_reclaimed")
    of = machine("v6e:2x2x1", 4 * PAGE, "float32", 0)
    kept = of.chosen(auto(*cycle, before=GENERATE)).record.kv_actions
    assert [each.lost_tokens for each in kept] == [0, of.tokens, of.tokens]
    flushed = of.chosen(auto(*cycle, "flush_cache", before=GENERATE)).record.kv_actions
    assert [each.lost_tokens for each in flushed] == [0, of.tokens, of.tokens]
    synced = (*cycle[:-1], "weights_synced", cycle[-1])
    assert [
        each.lost_tokens for each in of.chosen(auto(*synced, before=GENERATE)).record.kv_actions
    ] == [0, 0, 0]


def test_a_drop_is_not_possible_where_a_step_generates_beside_the_trainer():
    names = (*READY, "kv_cache_yielded", "trainer_ready", "beside", "kv_cache_reclaimed")
    of = machine("v5e:2x2x1", 4 * PAGE, "float32", 0)
    plan = of.chosen(auto(*names, beside=GENERATE))
    assert only_chosen(plan).action == SHRINK
    drop = plan.record.kv_actions[-1]
    assert drop.why_not == (
        "pipeline: step 'beside' needs the KV cache on the devices, but step 'kv_cache_yielded' "
        "removed it; put 'kv_cache_rebuilt' between"
    )
    assert kv_choice.described([drop]) == [f"kv=drop: not possible: {drop.why_not}"]


def test_an_action_that_no_request_of_a_step_survives_is_not_possible():
    def too_short(steps):
        if fold.kv_capacities(steps):
            raise fit_error

    fit_error = kv_choice.InputError("a request is too long")
    of = machine("v5e:2x2x1", 4 * PAGE, "float32", 4)
    keep, shrink, drop = of.chosen(refuse=too_short).record.kv_actions
    assert (keep.fits, shrink.why_not, drop.chosen) == (False, "a request is too long", True)


def test_an_order_that_no_action_makes_right_is_refused_by_what_is_wrong_with_keeping():
    assert refusal(auto, *READY, "kv_cache_dropped", "kv_cache_yielded") == (
        "pipeline: step 'kv_cache_yielded' needs the KV cache on the devices, but step "
        "'kv_cache_dropped' removed it; put 'kv_cache_rebuilt' between"
    )


def test_where_none_leaves_the_margin_the_one_that_frees_most_is_taken_if_it_fits():
    of = machine("v5e:2x2x1", 4 * PAGE, "float32", 0)
    full = of.by_itself(DROP).peak.max_device_bytes
    close = only_chosen(replace(of, hbm_bytes=full + 1).chosen())
    assert (close.action, close.fits) == (DROP, True)
    assert close.why_not.startswith("only 1 bytes of a device stay free")
    plan = replace(of, hbm_bytes=full - 1).chosen()
    assert only_chosen(plan).action == DROP
    assert fit.why_not_fit(plan.record).startswith("the plan does not fit: step 'trainer_ready'")


def test_a_given_action_leaves_nothing_open_and_a_given_capacity_is_that_of_the_smaller_cache():
    for action in (KEEP, DROP):
        steps = build([*READY, "it"], it={"use": "kv_cache_yielded", "kv": action})
        assert open_actions(steps) == ()
    shrink = {"use": "kv_cache_yielded", "kv": SHRINK}
    assert open_actions(build([*READY, "it"], it=shrink)) == (SHRINK,)
    given = build([*READY, "it"], it=shrink | {"max_total_tokens": 99})
    assert (open_actions(given), fold.kv_capacities(fold.check_order(given))) == ((), {99})
    own = auto(*READY, "kv_cache_yielded", kv_cache_yielded={"max_total_tokens": 3 * PAGE})
    of = machine("v6e:2x2x1", 4 * PAGE, "float32", 0)
    assert of.chosen(own).record.kv_actions[1].max_total_tokens == 3 * PAGE


@pytest.mark.parametrize("action", [KEEP, DROP])
def test_a_capacity_without_a_smaller_cache_is_refused(action):
    options = {"use": "kv_cache_yielded", "kv": action, "max_total_tokens": 64}
    assert refusal(build, [*READY, "it"], it=options) == (
        f"phases.it.max_total_tokens is 64, but kv={action} makes no smaller cache; leave one of "
        "them out"
    )


def test_an_unknown_action_is_refused_with_the_nearest():
    options = {"use": "kv_cache_yielded", "kv": "shrnk"}
    assert refusal(build, [*READY, "it"], it=options) == (
        "phases.it.kv is 'shrnk'; did you mean 'shrink'?"
    )
