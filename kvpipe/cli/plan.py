"""``kvpipe plan``: the bytes after each phase on a target machine."""

import json

from omegaconf import DictConfig

from kvpipe.checkpoints.model_dir import check_cache_dir, check_shape
from kvpipe.cli.common import PLANNERS, checked_steps, completed_elsewhere, notify, open_output
from kvpipe.config.schema import PlanFormat, from_plain, to_plain
from kvpipe.errors import HELD, InputError, KvpipeError
from kvpipe.parent.resumption import messages
from kvpipe.plan.fit import why_not_fit
from kvpipe.plan.targets import find_target
from kvpipe.report.plan import as_json, as_markdown


def act(composed: DictConfig) -> int:
    """Print or write the bytes after each phase on the target, and whether they fit.

    Raises:
        KvpipeError: they do not fit.
    """
    plain = completed_elsewhere(to_plain(composed))
    config = from_plain(plain)
    for line in messages(config, checked_steps(config, whole=False)):
        notify(f"kvpipe: {line}\n")
    check_shape(config)
    target = find_target(config.plan.target, config.engine)
    if config.plan.compile is True:
        check_cache_dir(config)
    elif config.plan.micro_batch:
        raise InputError("plan.micro_batch: it compiles the gradients; set plan.compile=true")
    record = PLANNERS.plan(config, plain, target)
    with open_output("plan.file", config.plan.file) as out:
        match config.plan.format:
            case PlanFormat.json:
                out.write(json.dumps(as_json(record)) + "\n")
            case PlanFormat.markdown:
                out.write(as_markdown(config.experiment, record))
            case PlanFormat.table:
                from kvpipe.report.plan_table import print_plan

                print_plan(config.experiment, record, out)
    if why := why_not_fit(record):
        raise KvpipeError(why)
    return HELD
