"""Draw the largest KV cache of a rollout and training cycle, from plans: the picture in rl.md.

The plans are the JSON lines of the sweep in rl.md: for each machine and length of an example, one with
the KV cache dropped while training and one with it kept. The table of rl.md goes to stdout.

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
LENGTHS = (512, 2048, 8192)
MACHINES = {"v4:2x2x1": "v4-8", "v5e:2x2x1": "v5e-4", "v6e:2x2x1": "v6e-4"}

PANEL, HEIGHT, LEFT, TOP, GAP, MARGIN = 270, 250, 84, 88, 30, 30
BOTTOM = TOP + HEIGHT
MOST = 1_500_000
INK, SOFT, LINE = "#1f2328", "#59636e", "#d1d9e0"
DROPPED, KEPT = "#0a6b4a", "#b3441e"


@dataclass(frozen=True)
class Point:
    """The plans of one machine and length, with the KV cache dropped and kept.

    Attributes:
        machine: name of the target.
        length: tokens of a micro-batch, which has one example.
        temp_bytes: temporaries of the train step on a device.
        needed: bytes that a device needs at the peak.
        fits: whether a device has them.
        most: largest ``engine.max_total_tokens``.
        hbm_bytes: memory of a device, in bytes.
    """

    machine: str
    length: int
    temp_bytes: int
    needed: tuple[int, int]
    fits: tuple[bool, bool]
    most: tuple[int, int]
    hbm_bytes: int


def points(plans: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the points of the sweep's plans, in the sweep's order: all lengths of each machine."""
    machines = dict.fromkeys(plan["target"] for plan in plans)
    keys = [(machine, length) for machine in machines for length in LENGTHS]
    pairs = list(zip(plans[::2], plans[1::2], strict=True))
    found = []
    for (machine, length), (dropped, kept) in zip(keys, pairs, strict=True):
        steps = [_training(plan) for plan in (dropped, kept)]
        assert dropped["target"] == kept["target"] == machine, (machine, dropped["target"])
        assert ["kv" in step["pools"] for step in steps] == [False, True], (machine, length)
        found.append(
            Point(
                machine,
                length,
                steps[0]["temp_bytes"],
                (_needed(dropped), _needed(kept)),
                (dropped["fit"]["fits"], kept["fit"]["fits"]),
                (dropped["fit"]["max_total_tokens"], kept["fit"]["max_total_tokens"]),
                dropped["fit"]["hbm_bytes"],
            )
        )
    return found


def _training(plan: dict[str, Any]) -> dict[str, Any]:
    return next(phase for phase in plan["phases"] if phase["name"] == "train_step")


def _needed(plan: dict[str, Any]) -> int:
    """Return the bytes of a device at the peak, including temporaries."""
    peak = plan["fit"]["peak_phase"]
    phase = next(phase for phase in plan["phases"] if phase["name"] == peak)
    held = phase["max_device_bytes"] + plan["fit"]["temp_bytes"]
    return max(held, phase.get("peak_device_bytes", 0))


def table(found: Sequence[Point]) -> str:
    """Return the Markdown table."""
    lines = [
        f"| machine | tokens of a micro-batch | temporaries | peak, cache of {TOKENS} dropped | kept "
        "| largest cache, dropped | kept |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for point in found:
        dropped, kept = (
            f"{needed / GIB:.2f}" if fits else f"**{needed / GIB:.2f}: does not fit**"
            for needed, fits in zip(point.needed, point.fits, strict=True)
        )
        name = f"{MACHINES[point.machine]}, {point.hbm_bytes // GIB} GiB"
        lines.append(
            f"| {name} | {point.length:,} | {point.temp_bytes / GIB:.2f} | {dropped} | {kept} "
            f"| {point.most[0]:,} | {point.most[1]:,} |"
        )
    return "\n".join(lines)


def svg(found: Sequence[Point]) -> str:
    """Return the picture: one panel per machine."""
    parts = [
        _text(LEFT, 26, "Largest KV cache of the cycle, in tokens", 17, INK, weight=600),
        *_legend(),
    ]
    machines = list(dict.fromkeys(point.machine for point in found))
    panels = max(len(machines), 2)  # the legend is as wide as two
    width = LEFT + panels * PANEL + (panels - 1) * GAP + 24
    for index, machine in enumerate(machines):
        mine = [point for point in found if point.machine == machine]
        parts += _panel(mine, LEFT + index * (PANEL + GAP), first=index == 0)
    middle = LEFT + (width - LEFT - 24) / 2
    parts.append(
        _text(
            middle,
            BOTTOM + 62,
            "tokens of a micro-batch; GiB of its temporaries on a device",
            13,
            SOFT,
            anchor="middle",
        )
    )
    height = BOTTOM + 78
    return (
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>\n'
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
    step = (PANEL - 2 * MARGIN) / (len(mine) - 1)
    xs = [left + MARGIN + step * place for place in range(len(mine))]
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
        size = f"{point.temp_bytes / GIB:.2f}"
        parts.append(_text(x, BOTTOM + 18, f"{point.length:,}", 12, INK, anchor="middle"))
        parts.append(_text(x, BOTTOM + 34, f"{size} GiB", 12, SOFT, anchor="middle"))
        # Above its point and the dashed line near the axis, else below its point.
        kept = point.most[1]
        y = min(_y(kept) - 10, _y(TOKENS) - 6) if kept < 200_000 else _y(kept) + 20
        parts.append(_text(x, y, f"{kept:,}", 12, KEPT, anchor="middle"))
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
