"""``kv: auto`` on the real engine: what the plan says of an action is what the run measures."""

import json
from dataclasses import replace
from itertools import product

import pytest

from kvpipe.checkpoints.model_dir import shape_dir
from kvpipe.plan import kv_choice
from kvpipe.plan.targets import find_target
from tests.command import kvpipe
from tests.conftest import ONE_LAYER
from tests.helpers_config import compose_plain, config_of

TINY = (
    *("+experiment=tiny_kv_auto", "repeat.times=1", ONE_LAYER),
    "plan.limit_bytes=27500000",  # the trainer fits beside half of the cache, as with all layers
)
CARRIED_OUT = pytest.mark.nightly(finds="a run that does otherwise than its plan has chosen")
YIELDED = "kv_cache_yielded"
RECLAIMED = {
    "kv_cache_yielded_for_trainer": "kv_cache_reclaimed_at_first",
    YIELDED: "kv_cache_reclaimed",
}


def costs_of(run):
    """Return the bytes that came free and those that were allocated again, each time."""
    for step, back in RECLAIMED.items():
        away, whole = run.phase(step), run.phase(back)
        dropped = away.get("drop_info", {}).get("freed_bytes", 0)
        smaller = away.get("rebuild_info", {}).get("allocated_bytes", 0)
        yield dropped - smaller, smaller + whole.get("rebuild_info", {}).get("allocated_bytes", 0)


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    """A run that generates while the trainer is on the devices, so that no drop is possible."""
    run = kvpipe(
        tmp_path_factory.mktemp("auto"),
        *TINY,
        "tracking=disabled",
        "pipeline_edit.after.weights_synced=generate_beside",
        "phases.generate_beside={use: generate, different_output_from: generate_rollout}",
        "phases.generate_trained.same_output_as=generate_beside",
        "phases.generate_trained.different_output_from=null",
    )
    assert run.exit_code == 0, run.end["error"]
    return run


@pytest.mark.slow
@CARRIED_OUT
def test_the_engine_generates_in_the_smaller_cache_while_the_trainer_is_there(generating):
    keep, shrink, drop = generating.phase("run_planned")["kv_actions"]
    assert [shrink["chosen"], shrink["why_not"]] == [True, None]
    assert "a device stay free, less than" in keep["why_not"]
    assert "step 'generate_beside' needs the KV cache on the devices" in drop["why_not"]
    beside = generating.phase("generate_beside")
    assert 0 < shrink["max_total_tokens"] < 4096
    assert {"params", "kv"} < {pool for pool, held in beside["ledger"].items() if held}
    assert beside["token_ids"] == generating.phase("generate_trained")["token_ids"]
    assert (
        generating.phase(YIELDED)["rebuild_info"]["max_total_tokens"] == shrink["max_total_tokens"]
    )


@pytest.mark.slow
@CARRIED_OUT
def test_the_chosen_action_frees_and_allocates_the_planned_bytes(generating):
    _, shrink, _ = generating.phase("run_planned")["kv_actions"]
    planned = shrink["freed_bytes"], shrink["remade_bytes"]
    assert list(costs_of(generating)) == [planned, planned]
    assert {generating.phase(step)["kv_action"] for step in RECLAIMED} == {"shrink"}


@pytest.mark.slow
@pytest.mark.nightly(finds="an action that frees or allocates other bytes than its plan says")
def test_every_action_costs_what_is_planned_of_it(tmp_path):
    planned = json.loads(kvpipe(tmp_path, "plan", *TINY, "plan.format=json").stdout)["kv_actions"]
    for action in planned:
        given = f"phases.{YIELDED}.kv={action['action']}"
        run = kvpipe(tmp_path, *TINY, "tracking=disabled", "plan.enforce=false", given)
        assert run.exit_code == 0, run.end["error"]
        # Only the capacity of the smaller cache is left to the plan.
        chosen = [each["action"] for each in run.phase("run_planned")["kv_actions"]]
        assert chosen == ["shrink"] * (action["action"] == "shrink")
        expected = action["freed_bytes"], action["remade_bytes"]
        assert list(costs_of(run)) == [expected, expected], action["action"]


# The larger cache of each is one that its devices hold without a trainer.
CACHES = {"v4:2x2x1": (131_072, 1_200_000), "v5e:2x2x1": (131_072, 500_000)}
CACHES["v6e:2x2x1"] = CACHES["v4:2x2x1"]
TRAINERS = (("float32", 8), ("bfloat16_gradients", 2), ("bfloat16", 1))
MACHINES = [
    (target, tokens, *trainer)
    for target, caches in CACHES.items()
    for tokens, trainer in product(caches, TRAINERS)
]


@pytest.mark.nightly(finds="a choice by other sizes than those of the engine's shapes")
def test_with_the_engines_own_shapes_the_smallest_action_that_fits_is_chosen(
    four_devices, tmp_path, monkeypatch
):
    from kvpipe.engine import shapes
    from kvpipe.worker import planner

    shapes_here = shapes.of_devices_here
    found = {}

    def of_devices_here(config, model_dir):
        key = config.max_total_tokens
        if key not in found:
            found[key] = shapes_here(config, model_dir)
        return found[key]

    monkeypatch.setattr(shapes, "of_devices_here", of_devices_here)

    def plan(target, tokens, trainer, micro_batch, **options):
        given = [f"phases.{YIELDED}.{key}={value}" for key, value in options.items()]
        given += [f"phases.{YIELDED}_for_trainer.{key}={value}" for key, value in options.items()]
        config = config_of(
            compose_plain(
                "+experiment=qwen25_3b_rl_cycle",
                "pipeline=rl_cycle_auto",
                f"trainer={trainer}",
                f"engine.max_total_tokens={tokens}",
                "trainer.loss=sft",
                "trainer.data=pkg://conf/data/additions.jsonl",
                f"trainer.micro_batch_size={micro_batch}",
                f"cache_dir={tmp_path}",
                *given,
            )
        )
        machine = find_target(target, config.engine)
        config = replace(config, engine=replace(config.engine, device="cpu"))
        steps = kv_choice.ordered(config)
        return planner.plan_for(machine, steps, config, shape_dir(config, tmp_path)).record

    def has_place(record):
        return record.fit.fits and record.warning is None

    actions = set()
    for of in MACHINES:
        chosen = plan(*of)
        (action,) = [each for each in chosen.kv_actions if each.chosen]
        actions.add(action.action)
        smaller = {"max_total_tokens": action.max_total_tokens} if action.action == "shrink" else {}
        assert replace(chosen, kv_actions=()) == plan(*of, kv=action.action, **smaller), of
        assert has_place(chosen), of
        if action.action != "keep":
            assert not has_place(plan(*of, kv="keep")), of
        if smaller:
            larger = action.max_total_tokens + 1
            assert not has_place(plan(*of, kv="shrink", max_total_tokens=larger)), of
    assert actions == {"keep", "shrink"}
