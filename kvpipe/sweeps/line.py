"""The straight line that the bytes of a KV cache lie on, over its capacity in tokens; exact.

Nothing here is rounded: all is integers and fractions, so a single byte off the line shows.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations


@dataclass(frozen=True)
class Line:
    """A straight line.

    Attributes:
        slope: bytes of a token.
        intercept: bytes at no tokens: the engine's pool has a page more than its capacity.
    """

    slope: Fraction
    intercept: Fraction

    def at(self, tokens: int) -> Fraction:
        """Return the bytes of a capacity."""
        return self.slope * tokens + self.intercept


def fitted(points: Iterable[tuple[int, int]]) -> Line | None:
    """Return the line that most of the points lie on; None if there are not two capacities.

    Least squares would bend towards a point that is off the line, and then blame all of them. Here
    the others keep a residual of 0, and that point alone is named.

    Args:
        points: capacities in tokens, each with the bytes that were measured.
    """
    lines = Counter(
        _through(one, other) for one, other in combinations(sorted(points), 2) if one[0] != other[0]
    )
    return lines.most_common(1)[0][0] if lines else None


def _through(one: tuple[int, int], other: tuple[int, int]) -> Line:
    slope = Fraction(other[1] - one[1], other[0] - one[0])
    return Line(slope, one[1] - slope * one[0])
