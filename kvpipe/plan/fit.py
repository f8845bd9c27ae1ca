"""Whether a plan fits the devices, why not, and the largest KV cache that would."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvpipe.config.schema import TrainerConfig
from kvpipe.pipeline.facts import KV_LIVE, own_kv_tokens
from kvpipe.pipeline.ledger import KV, OWN_PROGRAMS, KvTokens, Ledger, PoolSize, Size
from kvpipe.plan.fold import Plan, PlannedStep
from kvpipe.plan.pages import whole_pages
from kvpipe.plan.targets import CPU
from kvpipe.records.run import Fit, Program, RunPlanned

# Bytes that a device should have free for what a plan leaves out. Code and temporaries of the
# shipped models took 110 to 155 MB on v4, v5e and v6e; what is left out beside them, less than 10.
_MARGIN, _MARGIN_COMPILED = 256 << 20, 64 << 20


@dataclass(frozen=True)
class KvCapacity:
    """The KV cache that the ledgers were made with.

    Attributes:
        device_bytes: bytes that it takes on one device.
        tokens: its capacity on a data-parallel rank, a multiple of the page size.
        page_size: tokens in a page.
        engine_bytes: bytes of a device that the engine gives to the capacity (it adds a page on
            top of it); None if it takes any capacity.
        padded_bytes: returns the bytes that a device gives a cache of that many tokens; None if it
            pads nothing.
    """

    device_bytes: int
    tokens: int
    page_size: int
    engine_bytes: int | None = None
    padded_bytes: Callable[[int], int] | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token on one device, which has one page more than the capacity of its rank."""
        return self.device_bytes // (self.tokens + self.page_size)

    def most_in(self, room: int) -> int:
        """Return the largest capacity that ``room`` bytes of a device hold."""
        most = whole_pages(room // self.token_bytes - self.page_size, self.page_size)
        if self.padded_bytes is None or self.padded_bytes(most) <= room:
            return most
        pages = range(0, most + self.page_size, self.page_size)
        return max(0, bisect_right(pages, room, key=self.padded_bytes) - 1) * self.page_size

    @property
    def engine_tokens(self) -> int | None:
        """The capacity that the engine's own profile gives; None if it takes any."""
        if self.engine_bytes is None:
            return None
        return whole_pages(self.engine_bytes // self.token_bytes, self.page_size)


def engine_kv_bytes(memory_bytes: int, params_bytes: int, fraction: float) -> int:
    """Return the bytes of KV cache that the engine's own profile would give.

    The engine (``ModelRunner.profile_max_num_token``) takes what is free once its parameters are
    loaded, less the share ``1 - mem_fraction_static`` of what was free before, and cuts a larger
    ``max_total_tokens`` down silently; kvpipe makes that an error, so a plan must know it.

    It finds ``memory_bytes`` free before it loads: the HBM of a device; on the CPU, which it does
    not divide among the virtual devices, the host's RAM.
    """
    return max(0, int(memory_bytes * Fraction(str(fraction))) - params_bytes)


def temporaries(item: PlannedStep, programs: Sequence[Program]) -> int:
    """Return the bytes that a step needs on a device while it runs.

    A step that names the programs it runs needs the temporaries of these; any other may run the
    engine's steps, if there is a KV cache. ``programs`` have been compiled for the target.
    """
    runs = item.effect.runs
    if not runs and KV_LIVE not in item.facts:
        return 0
    sizes = [
        program.temp_bytes
        for program in programs
        if (program.name in runs if runs else program.name not in OWN_PROGRAMS)
    ]
    return max(sizes, default=0)


def fit_of(
    planned: Sequence[PlannedStep],
    ledgers: Sequence[Ledger],
    hbm_bytes: int,
    kv: KvCapacity,
    temporaries: Sequence[int] | None = None,
    reserve_bytes: int = 0,
    limited: bool = False,
    peaks: Sequence[int] | None = None,
) -> Fit:
    """Return whether every ledger fits devices of ``hbm_bytes`` bytes, and which is the fullest.

    ``temporaries`` are bytes that each step needs on a device while it runs, beside what its
    ledger says is there after it; ``reserve_bytes`` must stay free on each. ``limited`` says that
    ``hbm_bytes`` are those of ``plan.limit_bytes``. ``peaks`` are the most bytes that a step holds on
    a device, 0 where they are not known.

    It does not fit either if the engine would cut the KV cache down (:func:`engine_kv_bytes`).

    The largest ``engine.max_total_tokens`` that fits is exact: a device's share of the KV cache is
    proportional to tokens + page size, and nothing else in a ledger depends on the tokens. A cache
    that a step rebuilds to a capacity of its own does not depend on them. It is 0 if no capacity
    would help.
    """
    extra = temporaries or [0] * len(ledgers)
    within = peaks or [0] * len(ledgers)
    after = [
        max(ledger.per_device, default=0) + more
        for ledger, more in zip(ledgers, extra, strict=True)
    ]
    fullest = list(map(max, after, within))
    peak = max(range(len(fullest)), key=fullest.__getitem__)
    usable = hbm_bytes - reserve_bytes
    loads = _loads(planned, ledgers, kv, extra, within)
    too_full_without_kv = any(total > usable for total, held in loads if not held)
    most = kv.most_in(min((usable - total + held for total, held in loads if held), default=usable))
    cut = kv.engine_tokens if any(held for _, held in loads) else None
    if cut is not None:
        most = min(most, cut)
    return Fit(
        fits=fullest[peak] <= usable and (cut is None or kv.tokens <= cut),
        hbm_bytes=hbm_bytes,
        temp_bytes=extra[peak] if after[peak] == fullest[peak] else 0,
        peak_phase=planned[peak].step.step,
        max_total_tokens=0 if too_full_without_kv else most,
        reserve_bytes=reserve_bytes,
        limited=limited,
    )


def _loads(
    planned: Sequence[PlannedStep],
    ledgers: Sequence[Ledger],
    kv: KvCapacity,
    extra: Sequence[int],
    within: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the bytes of each device after and within each step, with those of the KV cache.

    They are 0 without a cache, and for one whose capacity ``engine.max_total_tokens`` does not set.
    """
    kv_bytes = kv.padded_bytes(kv.tokens) if kv.padded_bytes else kv.device_bytes
    after = [
        (total + more, kv_bytes if held and own_kv_tokens(item.facts) is None else 0)
        for item, ledger, more in zip(planned, ledgers, extra, strict=True)
        for total, held in zip(ledger.per_device, ledger.of(KV), strict=True)
    ]
    return after + [
        (most, kv_bytes if _has_kv_at_peak(planned, step, Size.KV) else 0)
        for step, most in enumerate(within)
    ]


def _has_kv_at_peak(planned: Sequence[PlannedStep], step: int, size: PoolSize) -> bool:
    """Whether a step holds a KV cache of a size at its peak."""
    there = step > 0 and planned[step - 1].pools.get(KV) == size
    return there or size in planned[step].effect.peak


def most_rows(config: TrainerConfig, fits: Callable[[int], bool]) -> int:
    """Return the largest micro-batch that fits, 0 if none does.

    Args:
        config: micro-batches divide its batch.
        fits: whether a micro-batch of that many examples fits; called as few times as possible,
            since it compiles.
    """
    sizes = [rows for rows in range(1, config.batch_size + 1) if config.batch_size % rows == 0]
    first_too_large = bisect_left(sizes, True, key=lambda rows: not fits(rows))
    return sizes[first_too_large - 1] if first_too_large else 0


def why_not_fit(plan: RunPlanned) -> str | None:
    """Return why a plan does not fit and the capacity that would; None if it fits."""
    fit = plan.fit
    if fit.fits:
        return None
    tokens = fit.max_total_tokens
    advice = f"engine.max_total_tokens={tokens} would fit" if tokens else "no KV cache would fit"
    if fit.temp_bytes and not tokens:
        # On a CPU they grow with the cache that they are compiled for.
        advice += " beside so many; plan a smaller one, whose temporaries may be smaller"
    needed = plan.needed_device_bytes
    needs = f"step {fit.peak_phase!r} needs {needed} bytes on a device"
    if fit.temp_bytes:
        needs += f", {fit.temp_bytes} of them for temporaries"
    has = f"which has {fit.hbm_bytes}{' (plan.limit_bytes)' if fit.limited else ''}"
    if fit.reserve_bytes:
        has += f" less {fit.reserve_bytes} for fragmentation (plan.reserve_bytes)"
    if needed > fit.hbm_bytes - fit.reserve_bytes:
        return f"the plan does not fit: {needs}, {has}; {advice}"
    return (
        f"the plan does not fit: {needs}, {has}, but the engine would cut its "
        f"KV cache down to what engine.mem_fraction_static leaves; {advice}"
    )


def left_out(plan: RunPlanned) -> str:
    """Return the bytes that a plan does not count, in words."""
    what = "the engine's small programs" if plan.programs else "compiled code, temporaries"
    if not plan.padded:
        what += ", the padding of small arrays (libtpu, which knows it, is not installed)"
    return f"{what} and the runtime's own memory are left out"


def free_bytes(plan: RunPlanned) -> int:
    """Return the bytes of the fullest device that stay free; less than 0 if it is too full."""
    fit = plan.fit
    return fit.hbm_bytes - fit.reserve_bytes - plan.needed_device_bytes


def warning(plan: RunPlanned) -> str | None:
    """Return why a plan that fits may not fit after all; None if it leaves the margin free."""
    free, (margin, what) = free_bytes(plan), _margin(plan)
    if not plan.fit.fits or free >= margin:
        return None
    return f"only {free:,} bytes of a device stay free, less than {margin:,}: {what}"


def _margin(plan: RunPlanned) -> tuple[int, str]:
    """Return the bytes of a device that should stay free, and their purpose."""
    if plan.target == CPU and not plan.programs:
        held = max(phase.pools.get(KV, 0) // plan.devices for phase in plan.phases)
        return held, "attention on a CPU copies the KV cache"
    return (_MARGIN_COMPILED if plan.programs else _MARGIN), left_out(plan)


def largest_own(plan: Plan, kv: KvCapacity, tokens: int) -> int:
    """Return the largest capacity, in place of a cache of ``tokens`` of its own, that leaves the margin.

    It is less than that of the engine's cache, and 0 if no capacity would do.
    """
    fit = plan.record.fit
    usable = fit.hbm_bytes - fit.reserve_bytes - _margin(plan.record)[0]
    own = kv.padded_bytes(tokens) if kv.padded_bytes else kv.token_bytes * (tokens + kv.page_size)
    beside = [
        total - own + temporaries(item, plan.record.programs)
        for item, ledger in zip(plan.steps, plan.ledgers, strict=True)
        if own_kv_tokens(item.facts) == tokens
        for total, held in zip(ledger.per_device, ledger.of(KV), strict=True)
        if held
    ]
    beside += [
        phase.peak_device_bytes - own
        for step, phase in enumerate(plan.record.phases)
        if phase.peak_device_bytes and _has_kv_at_peak(plan.steps, step, KvTokens(tokens))
    ]
    most = kv.most_in(usable - max(beside)) if beside else kv.tokens
    return min(most, kv.tokens - kv.page_size)
