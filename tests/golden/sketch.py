"""A few numbers of an array, by which another one can be held against it without the array itself.

The sums of an array with random signs: for the difference of two arrays their root mean square is an
unbiased estimate of its norm, to about a quarter with 16 of them.
"""

import hashlib
from typing import Any

import numpy as np

SUMS = 16


def sketch(name: str, array: Any) -> list[float]:
    """Return the sums of an array's values with signs that depend on its name alone."""
    flat = np.asarray(array, np.float64).reshape(-1)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    bits = np.random.PCG64(seed).random_raw(flat.size)
    return [
        float(np.where((bits >> np.uint64(number)) & np.uint64(1), flat, -flat).sum())
        for number in range(SUMS)
    ]


def norm_of_difference(one: list[float], other: list[float]) -> float:
    """Return an estimate of the norm of the difference of two arrays, from their sketches."""
    return float(np.sqrt(np.mean((np.array(one) - np.array(other)) ** 2)))
