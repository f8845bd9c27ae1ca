"""Make tests/golden/*.json: what Hugging Face transformers says that tiny models answer.

Run it by hand when kvpipe.checkpoints.tiny gives other bytes (its FORMAT_VERSION went up), under a
Python that has torch, which kvpipe itself never installs:

    python3.11 -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.13.0 transformers==4.55.4 ml_dtypes omegaconf
    PYTHONPATH=. /tmp/golden/bin/python tests/golden/make.py

Tests compare an engine's ids with these up to the first step whose `gap` is a near-tie.
"""

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpipe.checkpoints import tiny

SPECS = {
    "tiny_float32": {},
    "qwen2_untied_float32": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen3_float32": {"architecture": "Qwen3ForCausalLM"},
    "llama_float32": {
        "architecture": "LlamaForCausalLM",
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
PROMPTS = ("Hello", "The KV cache is dropped and rebuilt.")
NEW_TOKENS = 64


def main() -> None:
    for name, options in SPECS.items():
        golden = _golden(tiny.TinyModel(torch_dtype="float32", **options))
        text = json.dumps(golden, indent=1, ensure_ascii=False) + "\n"
        Path(__file__).with_name(f"{name}.json").write_text(text, encoding="utf-8")
        for answer in golden["answers"]:
            ids, gaps = answer["output_ids"], answer["gaps"]
            print(
                f"{name} {answer['prompt']!r}: {len(set(ids))} distinct ids of {len(ids)}, "
                f"smallest gap {min(gaps)} at step {gaps.index(min(gaps))}, "
                f"same in bfloat16 for {answer['same_in_bfloat16']} steps; text {answer['text']!r}"
            )


def _golden(spec: tiny.TinyModel) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        directory = tiny.ensure(spec, Path(cache))
        return {
            "spec": asdict(spec),
            "format_version": tiny.FORMAT_VERSION,
            "checkpoint_sha256": _sha256(directory / "model.safetensors"),
            "versions": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
            "new_tokens": NEW_TOKENS,
            "answers": _answers(directory),
        }


def _answers(directory: Path) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    rounded = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.bfloat16).eval()
    answers = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer(prompt)["input_ids"]
        output_ids, gaps, logprobs = _greedy(model, prompt_ids)
        rounded_ids, _, _ = _greedy(rounded, prompt_ids)
        answers.append(
            {
                "prompt": prompt,
                "prompt_ids": prompt_ids,
                "output_ids": output_ids,
                "text": tokenizer.decode(output_ids),
                "gaps": [round(gap, 5) for gap in gaps],
                "logprobs": [round(logprob, 6) for logprob in logprobs],
                "same_in_bfloat16": _common_prefix(output_ids, rounded_ids),
            }
        )
    return answers


def _greedy(
    model: torch.nn.Module, prompt_ids: list[int]
) -> tuple[list[int], list[float], list[float]]:
    """Return the greedy ids and, per step, how far the best logit is above the second, and its
    log-probability.
    """
    out = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = [logits[0].float().topk(2).values for logits in out.logits]
    logprobs = [float(logits[0].float().log_softmax(-1).max()) for logits in out.logits]
    ids = out.sequences[0, len(prompt_ids) :].tolist()
    return ids, [float(top - next_) for top, next_ in best], logprobs


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=True))
    return next((step for step, (one, other) in pairs if one != other), len(left))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
