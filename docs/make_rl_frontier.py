"""Draw the largest KV cache of a rollout and training cycle, from plans: the picture in rl.md.

The plans are the JSON lines of the sweep in rl.md: for each machine and precision, one with the KV
cache dropped while training and one with it kept. The table of rl.md goes to stdout.

.venv/bin/python docs/make_rl_frontier.py frontier.jsonl docs/rl_frontier.svg
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

GIB = 1024**3
TOKENS = 131072
PRECISIONS = {
    "float32": ("all float32", 16),
    "bfloat16_mu": ("bf16 first moment", 14),
    "bfloat16_gradients": ("bf16 gradients too", 12),
    "bfloat16": ("all bfloat16", 8),
}
MACHINES = {"v4:2x2x1": "v4-8", "v5e:2x2x1": "v5e-4", "v6e:2x2x1": "v6e-4"}

PANEL, HEIGHT, LEFT, TOP, GAP, MARGIN = 270, 250, 84, 88, 30, 30
WIDTH = LEFT + len(MACHINES) * PANEL + (len(MACHINES) - 1) * GAP + 24
BOTTOM = TOP + HEIGHT
MOST = 1_500_000
INK, SOFT, LINE = "#1f2328", "#59636e", "#d1d9e0"
DROPPED, KEPT = "#0a6b4a", "#b3441e"


@dataclass(frozen=True)
class Point:
    """The plans of one machine and precision.

    Attributes:
        machine, precision: names.
        trainer_bytes: bytes of the trainer on a device.
        needed: bytes that a device needs at the peak, with the cache dropped and kept.
        most: largest ``engine.max_total_tokens``, with the cache dropped and kept.
        hbm_bytes: memory of a device, in bytes.
    """

    machine: str
    precision: str
    trainer_bytes: int
    needed: tuple[int, int]
    most: tuple[int, int]
    hbm_bytes: int


def points(plans: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the points of the sweep's plans, in the sweep's order."""
    keys = [(machine, precision) for machine in MACHINES for precision in PRECISIONS]
    pairs = list(zip(plans[::2], plans[1::2], strict=True))
    found = []
    for (machine, precision), (dropped, kept) in zip(keys, pairs, strict=True):
        held = [_pools_in_training(plan) for plan in (dropped, kept)]
        assert dropped["target"] == kept["target"] == machine, (machine, dropped["target"])
        assert ["kv" in pools for pools in held] == [False, True], (machine, precision)
        slots = [size for pool, size in held[0].items() if pool.startswith("slot:")]
        found.append(
            Point(
                machine,
                precision,
                sum(slots) // dropped["devices"],
                (_needed(dropped), _needed(kept)),
                (dropped["fit"]["max_total_tokens"], kept["fit"]["max_total_tokens"]),
                dropped["fit"]["hbm_bytes"],
            )
        )
    return found


def _pools_in_training(plan: dict[str, Any]) -> dict[str, int]:
    return next(phase["pools"] for phase in plan["phases"] if phase["name"] == "train_step")


def _needed(plan: dict[str, Any]) -> int:
    """Return the bytes of a device at the peak, including temporaries."""
    peak = plan["fit"]["peak_phase"]
    phase = next(phase for phase in plan["phases"] if phase["name"] == peak)
    held = phase["max_device_bytes"] + plan["fit"]["temp_bytes"]
    return max(held, phase.get("peak_device_bytes", 0))


def table(found: Sequence[Point]) -> str:
    """Return the Markdown table."""
    lines = [
        f"| machine | trainer | its GiB a device | peak, cache of {TOKENS} dropped | kept "
        "| largest cache, dropped | kept |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for point in found:
        dropped, kept = (f"{needed / GIB:.2f}" for needed in point.needed)
        if point.needed[1] > point.hbm_bytes:
            kept = f"**{kept}: does not fit**"
        name = f"{MACHINES[point.machine]}, {point.hbm_bytes // GIB} GiB"
        lines.append(
            f"| {name} | `{point.precision}` | {point.trainer_bytes / GIB:.2f} | {dropped} | {kept} "
            f"| {point.most[0]:,} | {point.most[1]:,} |"
        )
    return "\n".join(lines)


def svg(found: Sequence[Point]) -> str:
    """Return the picture: one panel per machine."""
    parts = [
        _text(LEFT, 26, "Largest KV cache of the cycle, in tokens", 17, INK, weight=600),
        *_legend(),
    ]
    for index, machine in enumerate(MACHINES):
        mine = [point for point in found if point.machine == machine]
        parts += _panel(mine, LEFT + index * (PANEL + GAP), first=index == 0)
    middle = LEFT + (WIDTH - LEFT - 24) / 2
    parts.append(
        _text(
            middle,
            BOTTOM + 62,
            "GiB of the trainer on a device; bytes for each parameter",
            13,
            SOFT,
            anchor="middle",
        )
    )
    height = BOTTOM + 78
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _legend() -> list[str]:
    parts, x = [], LEFT
    for color, words in ((DROPPED, "cache dropped while training"), (KEPT, "cache kept")):
        parts.append(_line(x, 45, x + 24, 45, color, 2.5))
        parts.append(f'<circle cx="{x + 12}" cy="45" r="4" fill="{color}"/>')
        parts.append(_text(x + 32, 49.5, words, 13, INK))
        x += 60 + 7 * len(words)
    parts.append(_line(x, 45, x + 24, 45, INK, 1.2, dash="3 3"))
    parts.append(_text(x + 32, 49.5, f"{TOKENS} tokens", 13, INK))
    return parts


def _panel(mine: Sequence[Point], left: float, first: bool) -> list[str]:
    """Return the marks of one machine."""
    sizes = [point.trainer_bytes for point in mine]
    scale = (PANEL - 2 * MARGIN) / (max(sizes) - min(sizes))
    xs = [left + MARGIN + scale * (size - min(sizes)) for size in sizes]
    title = f"{MACHINES[mine[0].machine]}, {mine[0].hbm_bytes // GIB} GiB a device"
    parts = [_text(left, TOP - 12, title, 14, INK, weight=600)]
    for tokens in range(0, MOST + 1, 250_000):
        y = _y(tokens)
        parts.append(_line(left, y, left + PANEL, y, LINE, 1))
        if first:
            label = f"{tokens:,}" if tokens else "0"
            parts.append(_text(left - 8, y + 4, label, 12, SOFT, anchor="end"))
    parts.append(_line(left, _y(TOKENS), left + PANEL, _y(TOKENS), INK, 1.2, dash="3 3"))
    band = [*((x, _y(p.most[0])) for x, p in zip(xs, mine, strict=True))]
    band += reversed([(x, _y(p.most[1])) for x, p in zip(xs, mine, strict=True)])
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in band)
    parts.append(f'<polygon points="{corners}" fill="{DROPPED}" fill-opacity="0.08"/>')
    for which, color in enumerate((DROPPED, KEPT)):
        ys = [_y(point.most[which]) for point in mine]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
            for x, y in zip(xs, ys, strict=True)
        ]
    for x, point in zip(xs, mine, strict=True):
        words, bytes_each = PRECISIONS[point.precision]
        size = f"{point.trainer_bytes / GIB:.1f}"
        parts.append(_text(x, BOTTOM + 18, size, 12, INK, anchor="middle"))
        parts.append(_text(x, BOTTOM + 34, f"{bytes_each} B", 12, SOFT, anchor="middle"))
        title = f"{words}: {point.most[0]:,} dropped, {point.most[1]:,} kept"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{_y(point.most[1]):.1f}" r="9" fill-opacity="0">'
            f"<title>{escape(title)}</title></circle>"
        )
        if point.precision in ("float32", "bfloat16"):
            # Below its point, or next to it near the axis.
            near_axis = point.most[1] < 200_000
            at, anchor = (x - 10, "end") if near_axis else (x, "middle")
            y = _y(point.most[1]) + (12 if near_axis else 20)
            parts.append(_text(at, y, f"{point.most[1]:,}", 12, KEPT, anchor))
    top = mine[0].most[0]
    parts.append(_text(xs[0], _y(top) - 10, f"{top:,}", 12, DROPPED, anchor="middle"))
    return parts


def _y(tokens: int) -> float:
    return round(BOTTOM - HEIGHT * tokens / MOST, 1)


def _line(
    x1: float, y1: float, x2: float, y2: float, color: str, width: float, dash: str = ""
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}"{dashes}/>'
    )


def _text(
    x: float, y: float, words: str, size: int, color: str, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
    )


def main(plans_file: Path, picture: Path) -> None:
    """Read the plans, write the picture, print the table."""
    found = points([json.loads(line) for line in plans_file.read_text().splitlines()])
    picture.write_text(svg(found))
    print(table(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
