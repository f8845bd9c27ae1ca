"""The curves of training: a small chart for each number, a point for each cycle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe.records.run import PhaseRecord
from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.report.tables import NONE, Cell, Table
from kvpipe.units import counted

# Of rollouts; the last one may come after the last training step.
_ROLLOUTS = {
    "reward_mean": "mean reward",
    "reward_spread": "spread of the rewards",
    "distinct_samples": "distinct samples",
}
_TRAINING = {
    "loss": "loss",
    "entropy": "entropy, nats a token",
    "kl": "KL to the model's files, nats a token",
    "clipped_share": "share of clipped tokens",
    "gradient_norm": "norm of the gradients",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens learnt a second",
}
_POLICY = "engine against trainer, nats at most"
_MOST_POINTS, _MOST_ROWS = 200, 24
_ROLE = "pool-params"
_CELL_WIDTH, _CELL_HEIGHT, _PLOT = 300.0, 122.0, 66.0
_GAP, _TOP, _POINT = 24.0, 24.0, 5.0
_SMALL = 12.0


@dataclass(frozen=True)
class Curve:
    """A number over the steps of a run: its name, and each step's name and value."""

    name: str
    points: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class CurvesChart:
    """One small chart a curve, each on a scale of its own."""

    experiment: str
    curves: Sequence[Curve]

    def drawn(self, width: float) -> Drawing:
        """Return the chart as a drawing of this width."""
        columns = max(1, int(width // _CELL_WIDTH))
        cell = width / columns
        shapes: list[Shape] = []
        for number, curve in enumerate(self.curves):
            x, y = number % columns * cell, number // columns * _CELL_HEIGHT
            shapes += _drawn(curve, x, y, cell - _GAP)
        rows = (len(self.curves) + columns - 1) // columns
        title = f"Training of {self.experiment}"
        return Drawing(width, rows * _CELL_HEIGHT, title, self._description(), shapes)

    def _description(self) -> str:
        ends = (
            f"{c.name} {_text(c.points[0][1])} to {_text(c.points[-1][1])}" for c in self.curves
        )
        return f"From the first step to the last: {'; '.join(ends)}. The table has every number."


def training_of(phases: Sequence[PhaseRecord]) -> list[PhaseRecord]:
    """Return the training steps that had a loss."""
    return [phase for phase in phases if "train_step" in phase.fields and "loss" in phase.fields]


def curves_of(phases: Sequence[PhaseRecord]) -> list[Curve]:
    """Return the curves of a run's phases, those of training steps first; none without a loss."""
    training = training_of(phases)
    if not training:
        return []
    others = [phase for phase in phases if "train_step" not in phase.fields]
    found = {name: _points(others, key) for key, name in _ROLLOUTS.items()}
    found |= {name: _points(training, key) for key, name in _TRAINING.items()}
    checked = [phase for phase in phases if "policy_difference" in phase.fields]
    found[_POLICY] = [(p.phase, p.fields["policy_difference"]["most"]) for p in checked]
    return [Curve(name, _thinned(points)) for name, points in found.items() if points]


def training_table(phases: Sequence[PhaseRecord]) -> Table:
    """Return the table of the training steps, with a column for each number that a step has."""
    training, names = training_of(phases), {**_ROLLOUTS, **_TRAINING}
    keys = [key for key in names if any(key in phase.fields for phase in training)]
    rows = [[Cell(codes=[p.phase]), *(_cell(p.fields, key) for key in keys)] for p in training]
    columns = ["phase", *(names[key] for key in keys)]
    summary = counted(len(rows), "training step") if len(rows) > _MOST_ROWS else ""
    return Table("Training steps", columns, rows, summary=summary)


def _thinned(points: Sequence[tuple[str, float]]) -> Sequence[tuple[str, float]]:
    """Return evenly spaced points, the last one included, as many as a page can show."""
    gap = -(-len(points) // _MOST_POINTS)
    return points[::-gap][::-1]


def _points(phases: Sequence[PhaseRecord], key: str) -> list[tuple[str, float]]:
    return [(phase.phase, phase.fields[key]) for phase in phases if key in phase.fields]


def _cell(fields: Mapping[str, Any], key: str) -> Cell:
    return Cell(_text(fields[key])) if key in fields else Cell(NONE)


def _text(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _drawn(curve: Curve, x: float, y: float, width: float) -> Iterator[Shape]:
    """Yield a curve: its name, its largest and its smallest value, and its points from left to right."""
    values = [value for _, value in curve.points]
    least, most = min(values), max(values)
    low, top = y + _TOP + _PLOT, y + _TOP
    yield Text(x, y + 14, curve.name, "ink", size=_SMALL)
    yield Text(x + width, y + 14, _text(values[-1]), "ink", "end", _SMALL)
    yield Line(x, low, x + width, low, "grid")
    yield Line(x, top, x + width, top, "grid")

    def at(place: int) -> tuple[float, float]:
        right = place / max(1, len(values) - 1)
        up = (values[place] - least) / (most - least) if most > least else 0.5
        return x + _POINT / 2 + (width - _POINT) * right, low - _PLOT * up

    for place in range(1, len(values)):
        yield Line(*at(place - 1), *at(place), "peak", 1.5)
    for place, (step, value) in enumerate(curve.points):
        left, middle = at(place)
        half = _POINT / 2
        tip = f"{step}: {_text(value)}"
        yield Rect(left - half, middle - half, _POINT, _POINT, _ROLE, tip=tip)
    yield Text(x, low + 16, f"{_text(least)} to {_text(most)}", "quiet", size=_SMALL)
