"""Make tests/golden/*_gradients.json: losses and gradients that transformers has of tiny models.

Run it as make.py, and after it. A gradient is stored as its norm and its sketch. Each sequence is a
pass of its own, without padding, so that padding is not in the numbers that tests compare with.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kvpipe.checkpoints import tiny
from tests.golden.answers import NAMES, golden, spec
from tests.golden.sketch import sketch

# New tokens of a sequence: some that the model finds likely, then some that it does not.
LIKELY, UNLIKELY = 16, 24


def main() -> None:
    for name in NAMES:
        content = _gradients(name)
        text = json.dumps(content) + "\n"
        Path(__file__).with_name(f"{name}_gradients.json").write_text(text, encoding="utf-8")
        print(f"{name}: loss {content['loss']:.6f}, {len(content['gradients'])} gradients")


def _sequences(name: str) -> list[dict]:
    """Return prompts of two lengths, each with new tokens."""
    return [
        {
            "prompt_ids": answer["prompt_ids"],
            "new_ids": answer["output_ids"][:LIKELY]
            + [(37 * i * i + 11 * i + row) % 500 for i in range(UNLIKELY - 8 * row)],
        }
        for row, answer in enumerate(golden(name)["answers"])
    ]


def _gradients(name: str) -> dict:
    sequences = _sequences(name)
    total = sum(len(each["new_ids"]) for each in sequences)
    with tempfile.TemporaryDirectory() as cache:
        directory = tiny.ensure(spec(name), Path(cache))
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
        loss = torch.zeros(())
        for each in sequences:
            logprobs = _logprobs(model, each)
            each["logprobs"] = [round(value, 6) for value in logprobs.tolist()]
            loss = loss - logprobs.sum() / total
        loss.backward()
    return {
        "sequences": sequences,
        "loss": float(loss),
        "gradients": {
            leaf: {
                "norm": float(param.grad.double().norm()),
                "sketch": [float(f"{value:.9g}") for value in sketch(leaf, param.grad.numpy())],
            }
            for leaf, param in model.named_parameters()
        },
    }


def _logprobs(model: torch.nn.Module, sequence: dict) -> torch.Tensor:
    """Return the log-probability of each new token of a sequence."""
    prompt, new = sequence["prompt_ids"], sequence["new_ids"]
    logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(new)), torch.tensor(new)]


if __name__ == "__main__":
    main()
