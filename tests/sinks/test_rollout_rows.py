"""The rows of W&B's table of samples."""

from dataclasses import replace

from kvpipe.sinks.wandb_tables import ROLLOUT_COLUMNS, rollout_rows
from tests.sinks.pipeline_records import pipeline

SAMPLE = {
    "prompt": "sum",
    "index": 1,
    "text": "8",
    "finish_reason": "length",
    "token_ids": [1, 2],
    "logprobs": [-0.5, -1.0],
}
OLD, NEW = "c" * 16, "d" * 16


def weights(*digests):
    sample = SAMPLE | {
        "digests": [dict(zip(("from", "to", "weights_digest"), d, strict=True)) for d in digests]
    }
    record = replace(pipeline()[5], fields={"rollout_sha256": "e", "samples": [sample]})
    (row,) = rollout_rows(record)
    assert row[1:7] == ["sum", 1, "8", "length", 2, -1.5]
    return dict(zip(ROLLOUT_COLUMNS, row, strict=True))["weights_digest"]


def test_a_sample_has_the_digest_of_its_weights_and_each_range_of_tokens_if_there_are_several():
    assert weights((0, 2, OLD)) == OLD
    assert weights((0, 1, OLD), (1, 2, NEW)) == f"0:1 {OLD}, 1:2 {NEW}"
