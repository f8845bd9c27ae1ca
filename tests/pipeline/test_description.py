"""The output of ``kvpipe phases`` comes from the phases' own code, and every option says its unit."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from kvpipe.config.schema import Kvpipe, SamplingConfig
from kvpipe.pipeline import facts
from kvpipe.pipeline.description import Option, describe, meanings
from kvpipe.pipeline.ledger import KV, KvTokens
from kvpipe.pipeline.phase import Effect
from kvpipe.pipeline.phase_files import option_types, phase_class, phase_names
from kvpipe.pipeline.sampled import SampledPhase
from kvpipe.report.phases import as_json, as_markdown, effect_rows
from tests.command import environment
from tests.in_process import Answer, files
from tests.refusal import refusal

CONFIG = Kvpipe(sampling=SamplingConfig(max_new_tokens=7))
EVERY_OPTION = [(use, name) for use in phase_names() for name in option_types(phase_class(use))]
UNITS = r"\b(tokens?|bytes|seconds|without a unit)\b"


@pytest.mark.parametrize(("use", "option"), EVERY_OPTION)
def test_every_option_of_every_phase_is_explained_and_a_number_says_its_unit(use, option):
    (found,) = (o for o in describe(use, CONFIG).options if o.name == option)
    assert len(found.meaning.split()) >= 4
    if found.type.startswith(("int", "float")):
        assert re.search(UNITS, found.meaning)


@pytest.mark.parametrize("use", phase_names())
def test_no_docstring_explains_an_option_that_there_is_not(use):
    cls = phase_class(use)
    assert meanings(cls).keys() == option_types(cls).keys()


@pytest.mark.parametrize("use", phase_names())
def test_every_phase_has_a_summary_and_what_it_says_in_words_is_all_that_it_declares(use):
    doc = describe(use, CONFIG)
    assert doc.summary.endswith(".")
    assert "``" not in doc.summary
    words = " ".join(effect_rows(doc.effect).values())
    effect = doc.effect
    for fact in (*effect.needs, *effect.forbids, *effect.adds, *effect.removes):
        assert facts.meaning(fact).what in words
    for pool in effect.pools:
        assert f"{pool} has " in words


def test_an_options_default_is_the_one_that_a_step_would_get():
    options = {option.name: option for option in describe("generate", CONFIG).options}
    assert options["max_new_tokens"] == Option(
        "max_new_tokens",
        "int",
        False,
        7,
        "tokens to generate at most.",
    )
    assert (options["same_output_as"].type, options["same_output_as"].default) == (
        "str or null",
        None,
    )
    assert describe("param_dict", CONFIG).options[0].required


def test_a_kv_cache_of_another_capacity_is_described_in_tokens():
    doc = replace(describe("kv_cache_rebuilt", CONFIG), effect=Effect(pools={KV: KvTokens(400)}))
    assert effect_rows(doc.effect) == {"pools": "kv has the KV cache of 400 tokens"}
    (phase,) = as_json([doc])
    assert phase["effect"]["pools"] == {"kv": {"tokens": 400}}


def test_a_docstring_may_explain_options_together_and_over_several_lines():
    class Together(phase_class("flush_cache")):
        """Summary.

        Attributes:
            one, two: first line: with a colon,
                second line.
            three: alone.
        """

    text = "first line: with a colon, second line."
    assert meanings(Together) == {"one": text, "two": text, "three": "alone."}


def test_an_option_of_a_base_class_is_explained_there():
    class Hotter(SampledPhase):
        """Summary.

        Attributes:
            temperature: hotter than the base's.
        """

    explained = meanings(Hotter)
    assert explained["temperature"] == "hotter than the base's."
    assert explained["max_new_tokens"] == meanings(SampledPhase)["max_new_tokens"]


def test_the_json_has_every_phase_and_says_facts_in_words():
    docs = [describe(use, CONFIG) for use in phase_names()]
    data = json.loads(json.dumps(as_json(docs)))
    assert [phase["name"] for phase in data] == phase_names()
    dropped = next(phase for phase in data if phase["name"] == "kv_cache_dropped")
    assert dropped["effect"] == {
        "needs": {"engine": "a started engine", "kv:live": "the KV cache on the devices"},
        "forbids": {
            "in_flight": "a paused rollout with requests in flight",
            "kv:written": "a prefix cache in use",
        },
        "adds": {},
        "removes": {"kv:live": "the KV cache on the devices"},
        "pools": {"kv": "nothing"},
    }


def test_the_markdown_of_a_phase_has_its_options_and_its_effect():
    assert as_markdown([describe("param_dict", CONFIG)]).splitlines() == [
        "## `param_dict`",
        "",
        "Build a parameter set for the engine on the devices, beside the one it computes with.",
        "",
        "| option | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `slot` | str | `required` | name of the slot that holds the set. |",
        "| `source` | str | `mllm` | name of the host tree. |",
        "",
        "- needs: a started engine; the host parameters 'mllm'",
        "- forbids: a parameter set in slot 'SLOT'",
        "- adds: a parameter set in slot 'SLOT'",
        "- pools: slot:SLOT has a set of parameters",
        "- runs in: the worker",
    ]


def test_an_unknown_phase_is_refused_with_the_nearest():
    message = refusal(describe, "generat", CONFIG)
    assert message.startswith("there is no phase 'generat'; did you mean 'generate'")


PRINTS_PHASES = """
import sys
from kvpipe.cli import app
code = app.main(["kvpipe", "phases"])
print(*sorted(set(map(str.lower, sys.modules)) & set(sys.argv[1:])), file=sys.stderr)
sys.exit(code)
"""


def test_the_verb_prints_all_phases_without_what_makes_a_command_slow_and_leaves_nothing(tmp_path):
    slow_to_import = ("flax", "jax", "numpy", "optax", "pil", "sgl_jax", "transformers", "wandb")
    done = subprocess.run(
        [sys.executable, "-c", PRINTS_PHASES, *slow_to_import],
        cwd=tmp_path,
        env=environment(tmp_path) | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "\n")
    lines = done.stdout.splitlines()
    for use in phase_names():
        assert any(line.startswith(f"{use}  ") for line in lines), use
    assert max(map(len, lines)) <= 100
    assert files(tmp_path) == []


def test_a_word_after_the_verb_names_one_phase(kvpipe):
    one = kvpipe("phases", "generate", "describe.format=json", "sampling.max_new_tokens=9")
    (phase,) = json.loads(one.out)
    assert (phase["name"], phase["options"][0]["default"], one.err) == ("generate", 9, "")
    assert kvpipe("phases", "describe.phase=generate", "describe.format=markdown").out.startswith(
        "## `generate`\n"
    )
    assert kvpipe("phases", "generat") == Answer(
        2, "", "kvpipe: there is no phase 'generat'; did you mean 'generate'?\n"
    )
