from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpipe.engine
from kvpipe.config.schema import Kvpipe, SamplingConfig
from kvpipe.errors import InputError, KvpipeError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.description import meanings
from kvpipe.pipeline.phase import ParentPhase, Phase, WorkerPhase
from kvpipe.pipeline.phase_files import option_types, phase_class, phase_names
from kvpipe.pipeline.steps import build_steps, use_of
from kvpipe.records.run import RUN_RECORDS
from tests.helpers_config import ROOT, build, default_names
from tests.refusal import refusal as refusal_of
from tests.sop import STEPS

FILES = sorted(path.stem for path in (ROOT / "phases").glob("*.py") if path.stem != "__init__")


def refusal(pipeline, phases=None):
    return refusal_of(build_steps, Kvpipe(pipeline=pipeline, phases=phases or {}))


def step_of(use, options=None, **config):
    config = Kvpipe(pipeline=["it"], phases={"it": {"use": use} | (options or {})}, **config)
    (step,) = build_steps(config)
    return step


def test_every_file_in_phases_is_a_name_for_use_and_defines_one_phase():
    assert phase_names() == FILES
    for use in FILES:
        cls = phase_class(use)
        assert issubclass(cls, WorkerPhase | ParentPhase)
        assert cls.__module__ == f"kvpipe_phase_{use}"


def test_a_phase_is_frozen_without_a_decorator():
    (step,) = build_steps(Kvpipe(pipeline=["jax_ready"]))
    with pytest.raises(FrozenInstanceError):
        step.step = "another"


def test_every_option_of_every_phase_is_described_in_its_docstring():
    undescribed = {
        (use, option)
        for use in FILES
        for option in option_types(phase_class(use))
        if option not in meanings(phase_class(use))
    }
    assert undescribed == set()


def test_the_steps_are_in_the_order_of_the_pipeline_under_their_own_names():
    steps = build(default_names())
    assert [step.step for step in steps] == default_names()
    assert all(isinstance(step, Phase) for step in steps)


def test_the_steps_of_the_sop_have_the_phases_and_options_that_the_default_pipeline_says():
    options = {step.step: (type(step).__name__, asdict(step)) for step in build(STEPS)}
    sampling = {"max_new_tokens": 64, "temperature": 0.0, "ignore_eos": False, "seed": None}
    sampling |= {"top_p": 1.0, "top_k": None, "min_p": 0.0, "stop": (), "stop_token_ids": ()}
    control = {"aa_control": False, "same_cached_tokens_as": None}
    control |= {"different_output_from": None, "same_output_as_before": None}
    generate = sampling | control | {"weights": "real", "log_text": True}
    nothing = {"slots": (), "host": ()}
    expected = {
        "wandb_init": ("WandbInit", {}),
        "jax_ready": ("JaxReady", {}),
        "engine_ready_dummy": ("EngineReadyDummy", {"load_format": "dummy"}),
        "mllm_params_cpu_ready": (
            "MllmParamsCpuReady",
            {"name": "mllm", "dtype": None, "orbax": None},
        ),
        "sglang_param_dict_ready": ("ParamDict", {"slot": "param_dict", "source": "mllm"}),
        "weights_swapped_from_mllm": (
            "WeightsSwappedFromMllm",
            {"slot": "param_dict", "probe_tokens": 8},
        ),
        "param_sharing_check": ("ParamSharingCheck", {"slot": "param_dict"}),
        "after_cleanup": ("Release", nothing | {"slots": ("param_dict",)}),
        "generate_result": ("Generate", generate | {"same_output_as": None}),
        "flush_cache_before_kv_drop": ("FlushCache", {}),
        "kv_cache_dropped": ("KvCacheDropped", {}),
        "sglang_param_dict2_ready": ("ParamDict", {"slot": "param_dict2", "source": "mllm"}),
        "after_drop_mllm_params_cpu": ("Release", nothing | {"host": ("mllm",)}),
        "kv_cache_rebuilt": ("KvCacheRebuilt", {"max_total_tokens": None}),
        "generate_result_after_kv_rebuild": (
            "Generate",
            generate | {"same_output_as": "generate_result"},
        ),
        "after_drop_param_dict2": ("Release", nothing | {"slots": ("param_dict2",)}),
    }
    assert options == {
        name: (cls, {"step": name} | fields) for name, (cls, fields) in expected.items()
    }


def test_a_step_uses_the_phase_of_its_own_name_unless_it_says_another():
    config = Kvpipe(pipeline=["a"], phases={"a": {"use": "generate"}})
    assert use_of("a", config) == "generate"
    assert use_of("jax_ready", config) == "jax_ready"


def test_one_phase_may_occur_in_the_pipeline_under_two_names():
    phases = {"first": {"use": "flush_cache"}, "second": {"use": "flush_cache"}}
    steps = build_steps(Kvpipe(pipeline=["first", "second"], phases=phases))
    assert [(step.step, type(step).__name__) for step in steps] == [
        ("first", "FlushCache"),
        ("second", "FlushCache"),
    ]


def test_generate_takes_its_sampling_from_the_config_and_a_step_overrides_it():
    sampling = SamplingConfig(max_new_tokens=7, temperature=0.5, ignore_eos=True)
    step = step_of("generate", {"max_new_tokens": 3}, sampling=sampling)
    assert (step.max_new_tokens, step.temperature, step.ignore_eos) == (3, 0.5, True)


def test_an_integer_is_taken_where_a_float_is_meant():
    temperature = step_of("generate", {"temperature": 1}).temperature
    assert (temperature, type(temperature)) == (1.0, float)


def test_a_list_becomes_a_tuple_so_that_steps_stay_frozen():
    assert step_of("release", {"slots": ["a", "b"]}).slots == ("a", "b")


def test_null_is_taken_where_an_option_may_be_none():
    assert step_of("mllm_params_cpu_ready", {"dtype": None}).dtype is None


def test_an_empty_pipeline_is_refused():
    assert refusal([]) == "pipeline: it has no steps"


def test_a_step_listed_twice_is_refused_with_the_way_to_name_it_again():
    message = refusal(["jax_ready", "a", "jax_ready"], {"a": {"use": "flush_cache"}})
    assert message == (
        "pipeline: 'jax_ready' occurs 2 times; give each its own name and set "
        "'phases.<name>.use: jax_ready'"
    )


def test_a_step_without_a_phase_file_is_refused_with_the_nearest():
    assert refusal(["jax_redy"]) == (
        "pipeline step 'jax_redy': there is no phase 'jax_redy'; did you mean 'jax_ready' or "
        "'trainer_ready'?"
    )


def test_an_unknown_use_is_refused_with_the_step_and_the_nearest():
    assert refusal(["it"], {"it": {"use": "generat"}}) == (
        "pipeline step 'it': there is no phase 'generat'; did you mean 'generate'?"
    )


def test_a_use_that_is_like_nothing_is_refused_with_all_that_there_are():
    assert refusal(["it"], {"it": {"use": "zzz"}}) == (
        f"pipeline step 'it': there is no phase 'zzz'; valid are: {', '.join(FILES)}"
    )


def test_a_use_that_is_no_text_is_refused():
    assert refusal(["it"], {"it": {"use": 3}}) == "phases.it.use: 3 is of type int, not str"


def test_a_pipeline_item_that_is_no_text_is_refused_and_does_not_crash():
    """OmegaConf lets a list pass as an item of list[str]."""
    assert refusal([["jax_ready"]]) == "pipeline: ['jax_ready'] is of type list, not str"


def test_options_for_a_step_that_is_not_in_the_pipeline_are_refused_with_the_nearest():
    assert refusal(["jax_ready"], {"jax_redy": {}}) == (
        "phases.jax_redy: the pipeline has no step 'jax_redy'; did you mean 'jax_ready'?"
    )


def test_an_unknown_option_is_refused_with_the_nearest():
    assert refusal(["it"], {"it": {"use": "generate", "max_tokens": 4}}) == (
        "phases.it.max_tokens: generate has no option 'max_tokens'; "
        "did you mean 'max_new_tokens' or 'stop_token_ids' or 'same_cached_tokens_as'?"
    )


def test_the_name_of_the_step_is_not_an_option():
    assert refusal(["it"], {"it": {"use": "jax_ready", "step": "x"}}) == (
        "phases.it.step: jax_ready has no option 'step'; valid are: none"
    )


def test_a_missing_option_is_named():
    assert refusal(["it"], {"it": {"use": "param_dict"}}) == (
        "phases.it: param_dict needs the option 'slot'"
    )


@pytest.mark.parametrize(
    ("use", "option", "value", "reason"),
    [
        ("generate", "max_new_tokens", "five", "'five' is of type str, not int"),
        ("generate", "max_new_tokens", 2.5, "2.5 is of type float, not int"),
        ("generate", "max_new_tokens", True, "True is of type bool, not int"),
        ("generate", "log_text", 1, "1 is of type int, not bool"),
        ("generate", "temperature", "hot", "'hot' is of type str, not float"),
        ("generate", "temperature", False, "False is of type bool, not float"),
        ("generate", "same_output_as", 7, "7 is of type int, not str"),
        ("generate", "weights", None, "None is of type NoneType, not str"),
        ("release", "slots", "param_dict", "'param_dict' is of type str, not list"),
        ("release", "slots", ["a", 1], "1 is of type int, not str"),
    ],
)
def test_an_option_of_another_type_is_refused_with_its_key(use, option, value, reason):
    message = refusal(["it"], {"it": {"use": use, option: value}})
    assert message == f"phases.it.{option}: {reason}"


def test_a_phase_of_the_parent_cannot_follow_one_of_the_worker():
    assert refusal(["jax_ready", "wandb_init"]) == (
        "pipeline: 'wandb_init' runs before the engine's process is started, so it must come "
        "before 'jax_ready'"
    )


@given(st.text().filter(lambda name: name not in FILES and "#" not in name))
def test_whatever_is_no_file_in_phases_is_refused_by_name(name):
    message = refusal([name])
    assert f"pipeline step {name!r}: there is no phase {name!r}; " in message


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(plain_values)
def test_a_value_is_taken_as_it_is_or_refused_with_its_key_and_never_changed(value):
    phases = {"it": {"use": "generate", "max_new_tokens": value}}
    try:
        (step,) = build_steps(Kvpipe(pipeline=["it"], phases=phases))
    except InputError as error:
        assert str(error).startswith("phases.it.max_new_tokens")
        assert type(value) is not int or value < 1
    else:
        assert (step.max_new_tokens, type(value)) == (value, int)


@given(plain_values)
def test_a_list_option_takes_lists_of_texts_only(value):
    valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
    phases = {"it": {"use": "release", "slots": value}}
    try:
        (step,) = build_steps(Kvpipe(pipeline=["it"], phases=phases))
    except InputError as error:
        assert str(error).startswith("phases.it.slots: ")
        assert not valid
    else:
        assert valid
        assert step.slots == tuple(value)


@pytest.mark.parametrize(
    ("use", "option", "value", "message"),
    [
        ("generate", "weights", "reel", "weights is 'reel'; did you mean 'real'?"),
        ("generate", "max_new_tokens", 0, "max_new_tokens is 0, it must be at least 1"),
        ("weights_streamed", "probe_tokens", -1, "probe_tokens is -1, it must be at least 0"),
        (
            *("weights_swapped_from_mllm", "probe_tokens", -1),
            "probe_tokens is -1, it must be at least 0",
        ),
        (
            *("engine_ready_dummy", "load_format", "real"),
            "load_format is 'real'; valid are: auto, dummy",
        ),
        (
            *("mllm_params_cpu_ready", "dtype", "int8"),
            "dtype is 'int8'; valid are: bfloat16, float16, float32",
        ),
    ],
)
def test_a_value_that_a_phase_itself_refuses_is_reported_with_the_steps_name(
    use, option, value, message
):
    assert refusal_of(step_of, use, {option: value}) == f"phases.it.{message}"


@pytest.mark.parametrize(
    ("use", "compared"), [("generate", "same_output_as"), ("rollout", "same_rollout_as")]
)
def test_a_wrong_value_is_refused_as_such_before_what_it_would_mean_beside_others(use, compared):
    reported = refusal_of(step_of, use, {"temperature": -1, compared: "earlier"})
    assert reported == "phases.it.temperature is -1.0, it must be at least 0"


def test_the_engine_is_started_with_the_load_format_of_the_step(monkeypatch):
    """It was started with that of the config: with dummy weights that the plan called real."""
    engines = []

    def start(engine, *arguments):
        engines.append(engine)
        raise KvpipeError("that is all")

    monkeypatch.setattr(kvpipe.engine, "sglang", SimpleNamespace(start=start), raising=False)
    for module in ("weights", "owners"):
        monkeypatch.setattr(kvpipe.engine, module, None, raising=False)
    ctx = WorkerContext(Kvpipe(), "Hello")
    ctx.model_dir = Path("model")
    with pytest.raises(KvpipeError, match="that is all"):
        step_of("engine_ready_dummy", {"load_format": "auto"}).run(ctx)
    assert [engine.load_format for engine in engines] == ["auto"]


@pytest.mark.parametrize("name", RUN_RECORDS)
def test_the_name_of_a_record_of_the_run_is_refused_as_a_step(name):
    message = refusal(["jax_ready", name], {name: {"use": "jax_ready"}})
    assert message.startswith(f"pipeline: {name!r} is the name of a record of the run")


def test_a_name_with_the_mark_of_a_cycle_is_refused():
    assert "'a#2' has a '#', which marks the cycles" in refusal(["a#2"])


def test_the_file_of_a_phase_is_looked_at_once_for_all_its_steps(monkeypatch):
    """10,000 steps looked 10,000 times, which took more than all the rest of a step."""
    looked = []
    monkeypatch.setattr(
        "kvpipe.pipeline.steps.phase_class",
        lambda use, path: looked.append(use) or phase_class(use, path),
    )
    names = [f"ready{number}" for number in range(50)]
    build(names, **{name: {"use": "jax_ready"} for name in names})
    assert looked == ["jax_ready"]
