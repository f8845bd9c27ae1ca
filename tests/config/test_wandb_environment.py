import pytest

from kvpipe.config.schema import TrackingConfig, TrackingMode
from kvpipe.config.wandb_environment import variable_messages, with_wandb_variables

OURS = TrackingConfig(project="kv", name="run", entity="team", group="g", tags=["a", "b"])


def test_a_variable_fills_only_what_the_config_leaves_null():
    plain = {"tracking": {"entity": None, "name": "mine", "group": None, "tags": []}, "prompt": {}}
    environ = {"WANDB_ENTITY": "team", "WANDB_NAME": "theirs", "WANDB_RUN_GROUP": ""}
    tracking = {"entity": "team", "name": "mine", "group": None, "tags": []}
    assert with_wandb_variables(plain, environ) == {"tracking": tracking, "prompt": {}}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WANDB_ENTITY": "team"}, "tracking.entity is 'team', from WANDB_ENTITY"),
        ({"WANDB_NAME": "x"}, "WANDB_NAME is not read: tracking.name is 'run'"),
        ({"WANDB_RUN_GROUP": "x"}, "WANDB_RUN_GROUP is not read: tracking.group is 'g'"),
        ({"WANDB_PROJECT": "x"}, "WANDB_PROJECT is not read: tracking.project is 'kv'"),
        ({"WANDB_MODE": "online"}, "WANDB_MODE is not read: tracking.mode is 'offline'"),
        ({"WANDB_DISABLED": "true"}, "WANDB_DISABLED is not read: tracking.mode is 'offline'"),
        ({"WANDB_TAGS": "a"}, "WANDB_TAGS is not read: tracking.tags is ['a', 'b']"),
        (
            {"WANDB_RUN_ID": "x", "WANDB_LAUNCH": "1", "WANDB_FORK_FROM": "x?_step=1"},
            "not read: WANDB_FORK_FROM, WANDB_LAUNCH, WANDB_RUN_ID; each run is a new W&B run",
        ),
        (
            {"WANDB_NOTES": "x", "WANDB_DIR": "/x"},
            "not read: WANDB_DIR, WANDB_NOTES; W&B gets what the config says, in the run directory",
        ),
    ],
)
def test_a_run_says_of_each_variable_whether_it_is_read(environ, said):
    assert list(variable_messages(OURS, environ)) == [said]


def test_nothing_is_said_of_a_variable_that_is_empty_or_agrees_with_the_config():
    agreeing = {"WANDB_MODE": "offline", "WANDB_PROJECT": "kv", "WANDB_TAGS": "a,b"}
    empty = {"WANDB_DISABLED": "false", "WANDB_RUN_ID": "", "WANDB_NAME": ""}
    assert OURS.mode is TrackingMode.offline
    assert list(variable_messages(OURS, agreeing | empty)) == []
