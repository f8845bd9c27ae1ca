"""``kvpipe phases``: the documentation of the phases."""

import json

from omegaconf import DictConfig

from kvpipe.config.schema import PlanFormat, from_plain, to_plain
from kvpipe.errors import HELD
from kvpipe.pipeline.description import describe
from kvpipe.pipeline.phase_files import phase_names
from kvpipe.report import phases as report


def act(composed: DictConfig) -> int:
    """Print the documentation of each phase, or of the requested one."""
    config = from_plain(to_plain(composed))
    asked = config.describe.phase
    found = [
        describe(name, config) for name in ([asked] if asked else phase_names(config.phase_path))
    ]
    match config.describe.format:
        case PlanFormat.json:
            print(json.dumps(report.as_json(found)))
        case PlanFormat.markdown:
            print(report.as_markdown(found), end="")
        case PlanFormat.table:
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(report.as_markdown(found)))
    return HELD
