"""``kvpipe compare``: the differences between runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from kvpipe.cli.common import open_output
from kvpipe.config.schema import CompareFormat, from_plain, to_plain
from kvpipe.errors import HELD, InputError, KvpipeError
from kvpipe.report import comparison_report
from kvpipe.report.comparison import Comparison
from kvpipe.report.side import read_side


def act(composed: DictConfig, paths: Sequence[Path]) -> int:
    """Print the differences between runs, comparing each further run with the first.

    Raises:
        KvpipeError: a side cannot be read, or a difference exceeds its threshold.
    """
    config = from_plain(to_plain(composed))
    # Each side is named by one letter.
    if not 2 <= len(paths) <= 26:
        raise InputError(
            f"compare: name 2 to 26 run directories, not {len(paths)}: compare RUN_A RUN_B"
        )
    limits = config.compare
    comparison = Comparison.of([read_side(path) for path in paths])
    with open_output("compare.file", limits.file) as out:
        match limits.format:
            case CompareFormat.json:
                out.write(json.dumps(comparison.to_json(limits)) + "\n")
            case CompareFormat.markdown:
                out.write(comparison_report.as_markdown(comparison, limits))
            case CompareFormat.html:
                out.write(comparison_report.comparison_page(comparison, limits))
    if beyond := comparison.beyond(limits):
        raise KvpipeError("; ".join(beyond))
    return HELD
