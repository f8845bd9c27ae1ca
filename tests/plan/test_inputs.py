"""Refusals of every verb before anything is started: models, meshes, capacities, prompts, requests."""

import json
import shutil

import pytest

from kvpipe.checkpoints import tokenizer
from kvpipe.checkpoints.tiny import ensure
from kvpipe.checkpoints.tiny import tokenizer as tiny_tokenizer
from kvpipe.config.prompts import Prompt
from kvpipe.config.schema import TinyModel
from kvpipe.parent import doctor
from kvpipe.parent.planner_client import Planners
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fold import check_order
from tests.helpers_config import compose_plain, config_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The default's tiny model."""
    return ensure(TinyModel(num_hidden_layers=1), tmp_path_factory.mktemp("made"))


@pytest.fixture
def model(made, tmp_path):
    """A copy of it in ``model``, to spoil."""
    return shutil.copytree(made, tmp_path / "model")


CHAT = '{"messages": [{"role": "user", "content": "Hello"}]}\n'

REFUSED = {
    "engine.tp_size=3": (
        "engine.tp_size is 3, but the model has 4 attention heads, which it must divide; "
        "3 devices take engine.tp_size=1 engine.dp_size=3"
    ),
    "engine.tp_size=4 model.generate.intermediate_size=1022": (
        "engine.tp_size is 4, but the model has an intermediate_size of 1022, which it must "
        "divide; 4 devices take engine.tp_size=2 engine.dp_size=2"
    ),
    "engine.tp_size=4 model.generate.num_attention_heads=12 model.generate.num_key_value_heads=3": (
        "engine.tp_size is 4, but the model has 3 KV heads, and neither divides the other; "
        "4 devices take engine.tp_size=1 engine.dp_size=4"
    ),
    "engine.tp_size=4 model.generate.num_attention_heads=12 model.generate.num_key_value_heads=6": (
        "engine.tp_size is 4, but the model has 6 KV heads, and neither divides the other"
    ),
    "+experiment=qwen25_3b_bigkv engine.tp_size=5": "engine.tp_size is 5, but the model has 16 ",
    "engine.page_size=4096": (
        "engine.max_total_tokens: a KV cache of 2048 tokens holds no request in whole pages of "
        "engine.page_size=4096; it needs more than 7 tokens and a page"
    ),
    "engine.max_total_tokens=7": "engine.max_total_tokens: a KV cache of 7 tokens holds no request",
    "engine.max_total_tokens=2147483647": (
        "engine.max_total_tokens: a KV cache of 2147483647 tokens has more slots than the engine "
        "counts in 32 bits; it must be at most 2147483646 tokens"
    ),
    "engine.page_size=16 phases.kv_cache_rebuilt.max_total_tokens=1000000000000": (
        "engine.max_total_tokens: a KV cache of 1000000000000 tokens has more slots than the engine "
        "counts in 32 bits; it must be at most 2147483631 tokens"
    ),
    "engine.page_size=16 phases.kv_cache_rebuilt.max_total_tokens=15": (
        "engine.max_total_tokens: a KV cache of 15 tokens holds no request in whole pages"
    ),
    "engine.max_total_tokens=64 sampling.max_new_tokens=200 sampling.ignore_eos=true": (
        "step 'generate_result' asks for 200 tokens (sampling.max_new_tokens, or its own option) after a prompt of "
    ),
    "sampling.max_new_tokens=512": (
        "step 'generate_result' asks for 512 tokens (sampling.max_new_tokens, or its own option) after a prompt of "
    ),
    "phases.generate_result_after_kv_rebuild.max_new_tokens=9999": (
        "step 'generate_result_after_kv_rebuild' asks for 9,999 tokens"
    ),
    "phases.kv_cache_rebuilt.max_total_tokens=40": (
        "step 'generate_result_after_kv_rebuild' asks for 64 tokens"
    ),
    "phases.weights_swapped_from_mllm.probe_tokens=600": (
        "step 'weights_swapped_from_mllm' asks for 600 tokens"
    ),
    "prompt.text=null prompt.file=long.txt": (
        "prompt: it has 72,000 tokens, but engine.context_length is 512, which takes prompts of at "
        "most 505 (step 'weights_swapped_from_mllm')"
    ),
    "engine.context_length=4096": (
        "engine.context_length is 4096, but the model has 2048 positions (max_position_embeddings)"
    ),
    "+experiment=qwen25_3b_bigkv sampling.max_new_tokens=32768": (
        "step 'generate_result' asks for 32,768 tokens (sampling.max_new_tokens, or its own option) after a prompt of "
        "1, but the model's context is 32,768"
    ),
    "phases.mllm_params_cpu_ready.orbax=nowhere": (
        "phases.mllm_params_cpu_ready.orbax is 'nowhere', which is not a directory"
    ),
    "model.config=nosuch.json model.generate=null": "model.config: there is no 'nosuch.json' in ",
    "pipeline=rollout": "prompts: give one of prompts.file and prompts.texts, and not both",
    **{
        f"+experiment=tiny_rollout {line}": message
        for line, message in {
            "prompts.file=long.txt": (
                "prompts: the longest has 72,000 tokens, but engine.context_length is 256, which "
                "takes prompts of at most 249 (step 'rollout')"
            ),
            "sampling.max_new_tokens=250": "step 'rollout' asks for 250 tokens",
            "engine.max_total_tokens=50": "step 'rollout' asks for 16 tokens",
            "prompts.file=empty.jsonl": "prompts.file: empty.jsonl has no prompt",
            "prompts.file=lines.jsonl": "prompts.file: lines.jsonl, line 2: not JSON: ",
            "prompts.file=chat.jsonl": (
                "prompts: '1' has messages, but the model's tokenizer has no chat template; give "
                "'prompt' instead"
            ),
            "sampling.seed=null": "phases.rollout_control.seed is null and temperature is 1, so ",
        }.items()
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_engine_cannot_have_is_refused_by_check(kvpipe, tmp_path, line):
    (tmp_path / "long.txt").write_text("1" * 72_000)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "lines.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two"\n')
    (tmp_path / "chat.jsonl").write_text(CHAT)
    answer = kvpipe("check", *line.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"kvpipe: {REFUSED[line]}")


ACCEPTED = [
    "engine.max_total_tokens=2147483646",
    # 505 of 512 positions are for the prompt, 510 for the prompt and the new tokens.
    "prompt.text=1 sampling.max_new_tokens=509",
    "engine.max_total_tokens=67 prompt.text=1",
    "phases.mllm_params_cpu_ready.orbax=.",
    "engine.page_size=2048",
]


@pytest.mark.parametrize("line", ACCEPTED)
def test_what_just_fits_is_accepted(kvpipe, line):
    answer = kvpipe("check", *line.split())
    assert (answer.code, answer.err) == (0, "")


def test_one_token_more_than_fits_is_refused(kvpipe):
    for line in (
        "prompt.text=1 sampling.max_new_tokens=510",
        "prompt.text=1 engine.max_total_tokens=66",
    ):
        assert kvpipe("check", *line.split()).code == 2


def cut(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_tokenizer(model):
    for name in ("tokenizer.json", "vocab.json"):
        (model / name).unlink()


def of_four_heads(model):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": "four"}))


SPOILT = {
    "cut": (cut, "is damaged, truncated or not a safetensors file"),
    "no tokenizer": (without_tokenizer, "it has no tokenizer"),
    "four heads": (of_four_heads, "num_attention_heads is 'four'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_model_is_refused_by_check_run_and_doctor(kvpipe, model, case):
    spoil, why = SPOILT[case]
    assert kvpipe("check", "model.path=model").code == 0
    spoil(model)
    for verb in ("check", "run"):
        answer = kvpipe(verb, "model.path=model", "tracking=disabled")
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"kvpipe: model.path: {model}: ")
        assert why in answer.err
        assert answer.err.count("\n") == 1
    config = config_of(compose_plain(f"model.path={model}"))
    finding = doctor._model(config, check_order(build_steps(config)))
    assert finding.level is doctor.Level.BAD
    assert why in finding.found


def test_a_plan_needs_the_config_alone_but_what_else_is_there_must_be_right(
    kvpipe, model, monkeypatch
):
    monkeypatch.setattr(Planners, "plan", lambda *_: pytest.fail("it was planned"))
    cut(model)
    assert "is damaged, truncated" in kvpipe("plan", "model.path=model").err
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    with pytest.raises(pytest.fail.Exception, match="it was planned"):
        kvpipe("plan", "model.path=model")
    assert "holds no *.safetensors file" in kvpipe("check", "model.path=model").err


def test_a_pipeline_that_reads_no_weights_needs_none(kvpipe, model, tmp_path):
    (model / "model.safetensors").unlink()
    orbax = "phases.mllm_params_cpu_ready.orbax=."
    assert kvpipe("check", "model.path=model", orbax).code == 0
    assert kvpipe("check", "model.path=model", orbax, "engine.load_format=auto").code == 2


def test_a_model_in_the_hubs_cache_is_checked_as_far_as_it_is_there(kvpipe, made, tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots/abc"
    shutil.copytree(made, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    hub = ["model.generate=null", "model.id=some/model", f"engine.download_dir={tmp_path}"]
    assert kvpipe("check", *hub).code == 0
    index = snapshot / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "later.safetensors"}}')
    cut(snapshot)
    assert kvpipe("check", *hub).code == 0  # the run downloads the rest
    index.unlink()
    assert "is damaged, truncated" in kvpipe("check", *hub).err
    of_four_heads(snapshot)
    assert "model.id: " in (reported := kvpipe("check", *hub).err)
    assert "num_attention_heads is 'four'" in reported


def templated(model, template):
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return ["check", "+experiment=tiny_rollout", "model.path=model", "prompts.file=chat.jsonl"]


def test_a_chat_becomes_text_by_the_models_template_alone(kvpipe, tmp_path, model):
    content = "1" * 300
    (tmp_path / "chat.jsonl").write_text(CHAT.replace("Hello", content))
    command = templated(model, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}~")
    chat = Prompt("1", None, ({"role": "user", "content": content},))
    (ids,) = tokenizer.prompt_ids([chat], tokenizer.open_tokenizer(model))
    assert list(ids) == tiny_tokenizer(TinyModel()).encode(f"<user>{content}~").ids
    answer = kvpipe(*command)
    assert answer.code == 2
    assert answer.err.startswith(f"kvpipe: prompts: the longest has {len(ids)} tokens, but ")


def test_messages_that_the_template_refuses_are_named_with_its_reason(kvpipe, tmp_path, model):
    (tmp_path / "chat.jsonl").write_text(CHAT)
    answer = kvpipe(*templated(model, "{{ raise_exception('a system message is missing') }}"))
    assert (answer.code, answer.err) == (
        2,
        "kvpipe: prompts: the chat template refuses the messages of '1': a system message is "
        "missing\n",
    )
