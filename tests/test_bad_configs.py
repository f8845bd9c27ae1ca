"""Whatever is wrong with a config, it is refused in a few lines that name the key.

The configs are generated from the schema: one thing is wrong with each, whatever is right with the
rest. They are composed and checked in this process; a few go through the real command.
"""

import json
import math
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from typing import Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpipe.cli.common import checked_steps
from kvpipe.config.hydra_errors import COMPOSITION_ERRORS, one_message
from kvpipe.config.hydra_store import store_schema
from kvpipe.config.schema import Kvpipe, from_plain, to_plain
from kvpipe.errors import InputError
from kvpipe.pipeline.phase_files import option_types, phase_class
from kvpipe.system.places import CONF
from tests.helpers_config import compose_shipped_files_once, default_names
from tests.refusal import refusal
from tests.test_layers import RUN_CLI, python

words = st.from_regex(r"[a-z][a-z_]{2,9}", fullmatch=True).map(lambda word: f"{word}_zz")
numbers_that_are_none = st.sampled_from([math.nan, math.inf, -math.inf])


def leaves(cls=Kvpipe, path=""):
    """Yield the key and type of each scalar and list of the schema."""
    for name, hint in get_type_hints(cls).items():
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        kind = inner[0] if get_origin(hint) in (Union, type(int | None)) else hint
        if is_dataclass(kind):
            yield from leaves(kind, f"{path}{name}.")
        elif get_origin(kind) is not dict:
            yield f"{path}{name}", kind


LEAVES = {
    key: kind
    for key, kind in leaves()
    # Of the keys below these, the default config has none.
    if not key.startswith(("repeat.", "pipeline"))
}

POSITIVE_INTEGERS = [
    *(
        f"engine.{name}"
        for name in [
            "tp_size",
            "dp_size",
            "max_total_tokens",
            "context_length",
            "page_size",
            "max_running_requests",
            "max_prefill_tokens",
            "virtual_devices",
            "nnodes",
        ]
    ),
    "sampling.max_new_tokens",
    "tracking.text_max_chars",
    "plan.prompt_tokens",
    *(
        f"model.generate.{name}"
        for name in [
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ]
    ),
]
SECONDS = [
    "engine.watchdog_timeout",
    "runner.idle_timeout_s",
    "runner.shutdown_timeout_s",
    "runner.phase_timeout_s",
    "runner.run_timeout_s",
    "runner.phase_timeouts.jax_ready",
    "tracking.init_timeout_s",
    "tracking.finish_timeout_s",
]
# Numbers that may be 0.
INTEGERS = [
    "engine.node_rank",
    "trainer.seed",
    "plan.allowance_bytes",
    "compare.budget_bytes",
    "compare.allowance_bytes",
    "compare.compilations",
    "compare_plans.budget_bytes",
]
FLOATS = [
    "sampling.temperature",
    "trainer.learning_rate",
    "trainer.weight_decay",
    "compare.duration_factor",
]
CHOICES = [
    "engine.device",
    "engine.dtype",
    "engine.load_format",
    "engine.log_level",
    "trainer.dtype",
    "trainer.gradients_dtype",
    "trainer.mu_dtype",
    "runner.on_error",
    "tracking.mode",
    "output",
    "plan.format",
    "compare.format",
    "describe.format",
    "model.generate.architecture",
    "model.generate.torch_dtype",
    "phases.engine_ready_dummy.load_format",
    "phases.mllm_params_cpu_ready.dtype",
    "phases.generate_result.weights",
]
# A step, and another that must come later.
BEFORE = [
    ("wandb_init", "jax_ready"),
    ("jax_ready", "engine_ready_dummy"),
    ("engine_ready_dummy", "kv_cache_dropped"),
    ("mllm_params_cpu_ready", "sglang_param_dict_ready"),
    ("sglang_param_dict_ready", "weights_swapped_from_mllm"),
    ("generate_result", "generate_result_after_kv_rebuild"),
    ("kv_cache_dropped", "kv_cache_rebuilt"),
    ("sglang_param_dict2_ready", "after_drop_param_dict2"),
]


@cache
def default_phases():
    return to_plain(compose("config"))["phases"]


def wrong_value(kind):
    """Return values, as overrides write them, that are not of a type."""
    if kind is bool:
        return words | st.just("[1]") | st.just("{a: 1}")
    if kind in (int, float):
        return words | st.just("[1]") | st.just("{a: 1}") | st.just("true and false")
    if get_origin(kind) is list:
        return words | st.just("{a: 1}") | st.just("[[a]]") | st.integers(1, 9).map(str)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return words
    return st.just("[1]") | st.just("{a: 1}")


def one(key, value):
    return ([f"{key}={value}"], key)


@st.composite
def wrong_types(draw):
    key = draw(st.sampled_from(sorted(LEAVES)))
    return one(key, draw(wrong_value(LEAVES[key])))


@st.composite
def wrong_ranges(draw):
    which = draw(st.integers(0, 5))
    if which == 0:
        return one(draw(st.sampled_from(POSITIVE_INTEGERS)), draw(st.integers(-(2**40), 0)))
    if which == 1:
        wrong = st.floats(max_value=0, allow_nan=False) | numbers_that_are_none
        return one(draw(st.sampled_from(SECONDS)), draw(wrong))
    if which == 2:
        wrong = st.floats(max_value=0) | st.floats(min_value=1.01) | numbers_that_are_none
        return one("engine.mem_fraction_static", draw(wrong))
    if which == 3:
        wrong = st.floats(max_value=-1e-9, allow_nan=False) | numbers_that_are_none
        return one(draw(st.sampled_from(FLOATS)), draw(wrong))
    if which == 4:
        return one(draw(st.sampled_from(INTEGERS)), draw(st.integers(-(2**40), -1)))
    wrong = st.floats(max_value=0.99, allow_nan=False) | numbers_that_are_none
    return one("runner.heartbeat_s", draw(wrong))


@st.composite
def wrong_names(draw):
    word, plus = draw(words), draw(st.sampled_from(["", "+"]))
    section = draw(st.sampled_from(["engine", "sampling", "runner", "tracking", "model", "plan"]))
    step = draw(st.sampled_from(default_names()))
    # A step with options would be missed first: the message names those.
    at = draw(
        st.sampled_from([i for i, s in enumerate(default_names()) if s not in default_phases()])
    )
    cases = [
        ([f"{plus}{section}.{word}=1"], f"{section}.{word}"),
        ([f"+{word}=1"], word),
        ([f"phases.{word}.use=generate"], f"phases.{word}"),
        ([f"phases.{step}.use={word}"], word),
        ([f"phases.{step}.{word}=1"], f"phases.{step}.{word}"),
        ([f"runner.phase_timeouts.{word}=1"], f"runner.phase_timeouts.{word}"),
        ([f"pipeline.{at}={word}"], word),
        ([f"{draw(st.sampled_from(['engine', 'model', 'prompt', 'pipeline']))}={word}"], word),
        ([f"+experiment={word}"], word),
        ([word], word),
        *(one(key, word) for key in CHOICES),
    ]
    return draw(st.sampled_from(cases))


@st.composite
def wrong_orders(draw):
    first, second = draw(st.sampled_from(BEFORE))
    names = draw(st.permutations(default_names()))
    i, j = names.index(first), names.index(second)
    if i < j:
        names[i], names[j] = names[j], names[i]
    return ([f"pipeline.{at}={name}" for at, name in enumerate(names)], "pipeline: ")


@st.composite
def wrong_options(draw):
    """Give an option of a phase a value of another type, or a number below 0."""
    phases = default_phases()
    step = draw(st.sampled_from(default_names()))
    types = option_types(phase_class(phases.get(step, {}).get("use", step)))
    if not types:
        return one(f"phases.{step}.nosuch_zz", 1)
    option = draw(st.sampled_from(sorted(types)))
    number = {int, float} & {types[option], *get_args(types[option])}
    wrong = words | st.integers(-(2**40), -1) if number else st.just("{a: 1}")
    return one(f"phases.{step}.{option}", draw(wrong))


@st.composite
def contradictions(draw):
    tp, dp = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    step = draw(st.sampled_from(default_names()))
    seconds = draw(st.floats(0.1, 1e6))
    limit = draw(st.sampled_from(["phase_timeout_s", "run_timeout_s", f"phase_timeouts.{step}"]))
    return draw(
        st.sampled_from(
            [
                (
                    [
                        f"engine.tp_size={tp}",
                        f"engine.dp_size={dp}",
                        f"engine.virtual_devices={tp * dp + 1}",
                    ],
                    "engine.virtual_devices",
                ),
                (["engine.device=tpu", f"engine.virtual_devices={tp}"], "engine.virtual_devices"),
                (["runner.isolate=false", f"runner.{limit}={seconds}"], f"runner.{limit}"),
                ([f"engine.nnodes={tp + 1}"], "engine.dist_init_addr"),
                ([f"engine.nnodes={tp + 1}", "engine.dist_init_addr=zz"], "engine.dist_init_addr"),
                ([f"engine.node_rank={tp}"], "engine.node_rank"),
                (["prompt.file=nowhere.txt"], "prompt.file"),
                (["prompt.text=null"], "prompt"),
                ([f"prompt.sha256={draw(words)}"], "prompt.sha256"),
                ([f"model.path={draw(words)}"], "model.path"),
            ]
        )
    )


def check(overrides):
    """Compose a config and check it, as the command does."""
    try:
        plain = to_plain(compose("config", overrides=overrides))
        checked_steps(from_plain(plain))
    except COMPOSITION_ERRORS as error:
        raise InputError(one_message(error)) from None


@pytest.fixture(scope="module", autouse=True)
def composed():
    default_names()  # composes too, which cannot be done inside another composition
    store_schema()
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.MonkeyPatch.context() as patch,
    ):
        compose_shipped_files_once(patch)
        yield


bad_configs = st.one_of(
    wrong_types(), wrong_ranges(), wrong_names(), wrong_orders(), wrong_options(), contradictions()
)


def assert_refused_by_name(overrides, key):
    message = refusal(check, overrides)
    assert 1 <= len(message.splitlines()) <= 3
    assert key in message
    assert "Traceback" not in message


@pytest.mark.small
@settings(max_examples=15)
@given(bad_configs)
def test_a_bad_config_is_refused_in_a_few_lines_that_name_the_key(bad):
    assert_refused_by_name(*bad)


@pytest.mark.nightly(finds="a rare bad value that crashes, passes or is refused without its key")
@settings(max_examples=500)
@given(bad_configs)
def test_five_hundred_bad_configs_are_refused_too(bad):
    assert_refused_by_name(*bad)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["engine.page_size=[1]"], "engine.page_size"),
        (["sampling.temperature=nan"], "sampling.temperature"),
        (["pipeline.3=nosuch_zz"], "nosuch_zz"),
        (["pipeline.1=engine_ready_dummy", "pipeline.2=jax_ready"], "step 'engine_ready_dummy'"),
    ],
)
def test_the_real_command_refuses_it_with_exit_code_2_and_without_jax(tmp_path, overrides, key):
    done = python(RUN_CLI, "kvpipe", *overrides, cwd=tmp_path)
    *reported, last = done.stderr.splitlines()
    code, imported = json.loads(last)
    assert (code, done.stdout) == (2, "")
    assert key in reported[0]
    assert len(reported) <= 3
    assert {"jax", "jaxlib", "sgl_jax"} & set(imported) == set()
