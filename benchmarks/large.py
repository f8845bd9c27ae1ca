"""A model of 1.5 billion parameters with more tokens than fit this host, and with fewer.

It takes minutes and 12 GB, so it is run by name: make bench ARGS=large. On a host of 24 GiB the plan
refuses the whole procedure with 131,072 tokens because of the temporaries of a step. With 8,192 the
checkpoint is streamed in, and the engine generates.
"""

import tempfile

from benchmarks.command import CommandFailed, kvpipe
from benchmarks.start import STREAM_AND_GENERATE
from benchmarks.start_large import MODEL

_TOO_MANY, _FITTING = 131_072, 8_192
_REFUSED = 2


def measure() -> dict[str, float]:
    """Return exit code and CPU seconds of both; print the refusal.

    Raises:
        RuntimeError: the larger one was not refused, or the smaller one did not pass.
    """
    shape = [f"model.generate.{key}={value}" for key, value in MODEL.items()]
    options = (*shape, "engine.context_length=2048", "sampling.max_new_tokens=4")
    with tempfile.TemporaryDirectory() as cwd:
        try:
            kvpipe(cwd, *options, f"engine.max_total_tokens={_TOO_MANY}")
        except CommandFailed as refusal:
            if refusal.exit_code != _REFUSED:
                raise
            print(refusal)
        else:
            raise RuntimeError(f"{_TOO_MANY} tokens are not refused")
        passed = kvpipe(cwd, *STREAM_AND_GENERATE, *options, f"engine.max_total_tokens={_FITTING}")
    return {
        "large.refused_exit_code": _REFUSED,
        "large.passed_cpu_seconds": passed.cpu_seconds,
        "large.passed_peak_rss_bytes": max(
            p["memory"]["process_peak_rss_bytes"] for p in passed.phases if p["memory"]
        ),
    }
