from pathlib import Path

import pytest

from kvpipe.checkpoints.model_dir import cache_dir, check_model, find_model
from kvpipe.config.schema import Kvpipe, ModelConfig, TinyModel
from tests.refusal import refusal

SMALL = TinyModel(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=16,
    vocab_size=300,
)


def config(cache=None, **model):
    return Kvpipe(model=ModelConfig(**{"id": "some/model"} | model), cache_dir=cache)


def test_generated_checkpoints_are_kept_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir(config()) == Path("/home/someone/.cache/kvpipe")


def test_xdg_cache_home_moves_the_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir(config()) == Path("/elsewhere/kvpipe")


def test_the_config_moves_the_cache_and_may_say_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir(config(cache="~/models")) == Path("/home/someone/models")


@pytest.mark.parametrize("find", [check_model, find_model])
def test_a_model_directory_that_is_not_there_is_named(find, tmp_path):
    wrong = config(path=str(tmp_path / "nowhere"))
    assert refusal(find, wrong) == f"model.path: {tmp_path / 'nowhere'} is not a directory"


@pytest.mark.parametrize("find", [check_model, find_model])
def test_a_directory_without_config_json_is_named(find, tmp_path):
    assert refusal(find, config(path=str(tmp_path))) == f"model.path: {tmp_path} has no config.json"


def test_a_file_is_no_model_directory(tmp_path):
    (tmp_path / "file").touch()
    wrong = config(path=str(tmp_path / "file"))
    assert refusal(check_model, wrong) == f"model.path: {tmp_path / 'file'} is not a directory"


def test_a_relative_path_is_reported_with_the_directory_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = config(path="models/qwen")
    assert refusal(check_model, wrong) == f"model.path: {tmp_path}/models/qwen is not a directory"


def test_a_path_and_a_model_to_generate_contradict_each_other(tmp_path):
    wrong = config(path=str(tmp_path), generate=TinyModel(seed=1))
    assert refusal(check_model, wrong) == (
        "model: give one of model.path and a shape for model.generate, and not both; "
        "model.path needs no model.generate=null"
    )


def test_a_path_wins_over_the_generated_model_of_the_default(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_model(config(path=str(tmp_path), generate=TinyModel())) == tmp_path


def test_a_path_is_found_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert find_model(config(path="model")) == tmp_path / "model"


def test_a_model_is_generated_once_and_then_found(tmp_path):
    found = find_model(config(cache=str(tmp_path), generate=SMALL))
    written = {path: path.stat().st_mtime_ns for path in found.iterdir()}
    assert found.parent == tmp_path
    assert {"config.json", "tokenizer.json"} <= {path.name for path in written}
    assert find_model(config(cache=str(tmp_path), generate=SMALL)) == found
    assert {path: path.stat().st_mtime_ns for path in found.iterdir()} == written


def test_a_model_of_the_hub_is_asked_for_with_its_revision_and_cache(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    wanted = config(revision="abc123")
    wanted.engine.download_dir = "/models"
    assert find_model(wanted) == tmp_path
    assert calls == [
        (
            "some/model",
            {
                "revision": "abc123",
                "cache_dir": "/models",
                "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model"],
            },
        )
    ]


def test_a_hub_that_cannot_be_reached_is_one_message_with_the_way_out(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(repo, **options):
        raise LocalEntryNotFoundError("no network, and not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert refusal(find_model, config()) == (
        "model.id: cannot get 'some/model' from the Hugging Face hub (no network, and not in the "
        "cache); set model.path to a directory that has it"
    )


def test_an_id_that_the_hub_cannot_have_is_refused_without_a_traceback():
    """The hub's client refuses it with an error of its own, before any contact."""
    message = refusal(find_model, config(id="no/such/model"))
    assert message.startswith("model.id: cannot get 'no/such/model' from the Hugging Face hub (")
