from dataclasses import asdict

import pytest

from kvpipe.records import progress
from kvpipe.records.progress import COMPILING, GENERATING, LOADING, Progress


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (
            Progress("a", GENERATING, 3.14, {"tokens": 12}, {"tokens": 64}),
            "generating 12/64 tokens, 3.1 s",
        ),
        (
            Progress(
                "a",
                LOADING,
                1.0,
                {"leaves": 12, "bytes": 2**29},
                {"leaves": 434, "bytes": 2**33},
            ),
            "loading 12/434 leaves, 0.500/8.000 GiB, 1.0 s",
        ),
        (Progress("a", COMPILING, 6.25, {"programs": 3}), "compiling program 4, 6.2 s"),
    ],
)
def test_progress_reads_as_a_sentence_and_comes_back_from_json(one, text):
    assert str(one) == text
    assert Progress(**asdict(one)) == one


def test_an_activity_is_known_while_it_is_under_way_and_read_each_time():
    tokens = [0]
    assert progress.now() is None
    with progress.under_way(GENERATING, {"tokens": 4}, lambda: {"tokens": tokens[0]}):
        tokens[0] = 3
        activity = progress.now()
        assert activity is not None
        now = activity.progress("generate_result")
        assert now == Progress(
            "generate_result", GENERATING, now.elapsed_s, {"tokens": 3}, {"tokens": 4}
        )
        assert 0 <= now.elapsed_s < 10
    assert progress.now() is None


def test_an_activity_that_breaks_off_is_no_longer_under_way():
    with pytest.raises(ValueError, match="broken"), progress.under_way(LOADING, {}, dict):
        raise ValueError("broken")
    assert progress.now() is None
