"""Plan a run with the sizes of the installed engine. It needs jax, so it runs in a child process.

The fold itself is in :mod:`kvpipe.plan`, which needs no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpipe import plan
from kvpipe.engine import devices, shapes
from kvpipe.errors import InputError
from kvpipe.ledger import Ledger
from kvpipe.phase import Phase, Size
from kvpipe.records import RunPlanned
from kvpipe.schema import EngineConfig


@dataclass(frozen=True)
class Plan:
    """A plan for the devices that jax has.

    Attributes:
        record: the plan as a record.
        ledgers: the exact ledger after each step, per device.
    """

    record: RunPlanned
    ledgers: tuple[Ledger, ...]


def plan_here(steps: Sequence[Phase], config: EngineConfig, model_dir: Path) -> Plan:
    """Plan the steps for this machine's devices.

    Args:
        steps: all steps of the pipeline, in order.
        config: how the engine will be started.
        model_dir: directory with the model's config.json.
    """
    devices.check_devices(config)
    planned = plan.check_order(steps)
    sizes = shapes.sizes(config, model_dir)
    count = len(sizes[Size.KV])
    ledgers = plan.plan_ledgers(planned, sizes, count)
    tokens = config.max_total_tokens // config.page_size * config.page_size
    capacity = plan.KvCapacity(sizes[Size.KV][0], tokens, config.page_size)
    record = RunPlanned(
        target=config.device,
        devices=count,
        sglang_jax=devices.describe()["sgl_jax_version"],
        phases=plan.planned_phases(planned, ledgers),
        fit=plan.judge(planned, ledgers, devices.memory_bytes(), capacity),
    )
    return Plan(record, ledgers)


def refuse_misfit(planned: RunPlanned) -> None:
    """Refuse a plan that does not fit.

    Raises:
        InputError: with the peak, what a device has, and the largest capacity that would fit.
    """
    if planned.fit.fits:
        return
    tokens = planned.fit.max_total_tokens
    advice = f"engine.max_total_tokens={tokens} would fit" if tokens else "no KV cache would fit"
    peak = next(p for p in planned.phases if p.name == planned.fit.peak_phase)
    raise InputError(
        f"the plan does not fit: step {peak.name!r} needs {peak.max_device_bytes} bytes on a "
        f"device, which has {planned.fit.hbm_bytes}; {advice} (plan.enforce=false runs it all the same)"
    )
