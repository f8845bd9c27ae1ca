"""The command line inserts, replaces and removes steps; whatever is wrong is refused by its name."""

import pytest

from kvpipe.config.pipeline_edit import PipelineEdit
from kvpipe.config.schema import from_plain
from kvpipe.pipeline.steps import build_steps
from tests.helpers_config import compose_plain, config_of, default_names
from tests.refusal import refusal

A_TO_C = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("edit", "edited"),
    [
        (PipelineEdit(), "a b c"),
        (PipelineEdit(after={"b": "x"}), "a b x c"),
        (PipelineEdit(before={"a": ["x", "y"]}), "x y a b c"),
        (PipelineEdit(replace={"b": "x"}), "a x c"),
        (PipelineEdit(replace={"b": ["b", "x"]}), "a b x c"),
        (PipelineEdit(remove="c"), "a b"),
        (PipelineEdit(remove=["a", "c"]), "b"),
        (PipelineEdit(remove=["b"], before={"b": "x"}, after={"b": "y"}), "a x y c"),
        (PipelineEdit(after={"a": None}, replace={"b": None}, remove=[]), "a b c"),
        # A step that moves.
        (PipelineEdit(after={"a": "c"}, remove="c"), "a c b"),
    ],
)
def test_each_change_counts_from_the_list_as_it_is_written(edit, edited):
    assert edit.of(A_TO_C) == edited.split()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            PipelineEdit(after={"d": "x"}),
            "after.d: the pipeline has no step 'd'; valid are: a, b, c",
        ),
        (PipelineEdit(before={"d": "x"}), "before.d: the pipeline has no step 'd'"),
        (
            PipelineEdit(replace={"x": "a"}, before={"a": "x"}),
            "replace.x: the pipeline has no step",
        ),
        (PipelineEdit(remove=["a", "d"]), "remove: the pipeline has no step 'd'"),
        (
            PipelineEdit(after={"a": 3}),
            "after.a is 3, it must be the name of a step or a list of names",
        ),
        (PipelineEdit(replace={"a": [["b"]]}), "replace.a is [['b']], it must be the name"),
        (PipelineEdit(remove={"a": "b"}), "remove is {'a': 'b'}, it must be the name"),
        (
            PipelineEdit(remove="a", replace={"a": "x"}),
            "'a' is in remove and in replace; leave one",
        ),
    ],
)
def test_a_wrong_change_is_refused_with_its_key_and_the_step(edit, message):
    reported = refusal(edit.of, A_TO_C).removeprefix("pipeline_edit").lstrip(":. ")
    assert reported.startswith(message)


def test_the_command_line_changes_the_pipeline_and_its_options_follow():
    """Options and the limit of a step that goes go along; those of a new step count."""
    plain = compose_plain(
        "pipeline_edit.after.kv_cache_rebuilt=rebuilt_output",
        "phases.rebuilt_output={use:generate,max_new_tokens:3}",
        "pipeline_edit.remove=[generate_result_after_kv_rebuild]",
        "runner.phase_timeouts={generate_result_after_kv_rebuild:5,rebuilt_output:6}",
    )
    config = config_of(plain)
    steps = {step.step: step for step in build_steps(config)}
    expected = [name for name in default_names() if name != "generate_result_after_kv_rebuild"]
    expected.insert(expected.index("kv_cache_rebuilt") + 1, "rebuilt_output")
    assert list(steps) == expected
    assert steps["rebuilt_output"].max_new_tokens == 3
    assert config.runner.phase_timeouts == {"rebuilt_output": 6.0}
    # The record has the config as it was given, and gives the same steps again.
    assert plain["pipeline"] == default_names()
    assert from_plain(plain) == config
