"""Check all weights, by name, shape and value, before any of the engine's are replaced.

A swap that failed half way could not restore the old weights. Names and shapes are read from the
headers at no cost; finding a non-finite value takes one pass at memory speed, and the digests are
summed in the same pass. With digests a file is read once a process: they prove afterwards that the
devices hold the checked values.
"""

from bisect import bisect_left
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from kvpipe.checkpoints import mapped
from kvpipe.checkpoints.tensor_names import (
    EMBEDDING,
    HEAD,
    computed,
    differences,
    listed,
    wrong_dtype,
)
from kvpipe.engine.digests import Digest, Rule, SourceSum
from kvpipe.engine.params import Param
from kvpipe.engine.transfer import in_lane
from kvpipe.engine.weight_map import HostArray, Leaf
from kvpipe.errors import WeightsError

_BLOCK_BYTES = 1 << 20  # fits a core's cache between the two reductions
# Digests of tensors of files, all of them finite, as long as the file is unchanged.
_of_files: dict[Any, Digest] = {}
_DIGEST_BLOCK_BYTES = 1 << 19  # fits it with the products of twice the size


def check_weights(
    leaves: Mapping[str, Leaf],
    blueprint: Mapping[str, Param],
    weights: Mapping[str, HostArray],
    rules: Mapping[str, Rule] | None = None,
) -> dict[str, Digest]:
    """Refuse host weights that are incomplete, of wrong shapes, or not finite; return digests.

    Args:
        leaves: the checkpoint tensor behind each parameter, by path.
        blueprint: required shape, dtype and sharding of each parameter, by path.
        weights: arrays by Hugging Face name, in Hugging Face layout.
        rules: source of the elements of each parameter, by path.

    Returns:
        The digest that a parameter has if it equals its weight, by path; only for parameters with a
        rule.

    Raises:
        WeightsError: naming every weight that is missing, unexpected, misshapen, of a non-float
            dtype, or with a value that is not finite in the engine's dtype.
    """
    check_shapes(leaves, blueprint, weights)
    # The largest first, so that no lane ends with a large one while the others are idle.
    by_size = sorted(leaves.values(), key=lambda leaf: -weights[leaf.source].nbytes)
    digests: dict[str, Digest] = {}
    sums: dict[str, tuple[Any, SourceSum]] = {}
    checks = {}
    for i, leaf in enumerate(by_size):
        weight, dtype = weights[leaf.source], blueprint[leaf.path].dtype
        source = None
        if rules:
            rule = rules[leaf.path]
            key = (mapped.identity(weight), rule, dtype)
            if key in _of_files:
                digests[leaf.path] = _of_files[key]
                continue
            source = SourceSum(rule, weight, dtype)
            sums[leaf.path] = key, source
        checks[leaf.source] = in_lane(i, is_finite, weight, dtype, source)
    finite = {name: check.result() for name, check in checks.items()}
    refuse_infinite([leaf.source for leaf in leaves.values() if not finite.get(leaf.source, True)])
    for path, (key, source) in sums.items():
        digests[path] = source.digest
        if key[0] is not None:
            _of_files[key] = source.digest
    return digests


def check_shapes(
    leaves: Mapping[str, Leaf], blueprint: Mapping[str, Param], weights: Mapping[str, Any]
) -> None:
    """Refuse weights, on the host or on the devices, that are incomplete or of wrong shapes.

    The arguments are those of :func:`check_weights`.

    Raises:
        WeightsError: naming every weight that is missing, unexpected, misshapen or not a float.
    """
    sources = {leaf.source for leaf in leaves.values()}
    misshapen = [_misshapen(leaf, blueprint[leaf.path], weights) for leaf in leaves.values()]
    wrong = [text for text in misshapen if text]
    _refuse(differences(sources, weights, wrong, _spare(weights, sources)))


def refuse_infinite(names: list[str]) -> None:
    """Refuse the named weights, if any: they have values that are not finite.

    Raises:
        WeightsError: with the names.
    """
    if names:
        _refuse([listed("with values that are not finite", [repr(name) for name in names])])


def _refuse(faults: list[str]) -> None:
    if faults:
        raise WeightsError(f"the weights are refused; {'; '.join(faults)}")


def _spare(weights: Mapping[str, Any], sources: set[str]) -> set[str]:
    """Return the weights that no parameter uses and that are allowed: they add no information."""
    spare = computed(weights)
    both = HEAD not in sources and {EMBEDDING, HEAD} <= weights.keys()
    if both and np.array_equal(weights[HEAD], weights[EMBEDDING]):  # a tied head, written out
        spare.add(HEAD)
    return spare


def _misshapen(leaf: Leaf, needed: Param, weights: Mapping[str, Any]) -> str:
    if leaf.source not in weights:
        return ""
    given = weights[leaf.source]
    if wrong := wrong_dtype(leaf.source, given):
        return wrong
    fitted = leaf.fitted_shape(given.shape)
    if fitted == needed.shape:
        return ""
    return (
        f"weight {leaf.source!r} has shape {given.shape}, which gives {fitted} for "
        f"{leaf.path!r}, where the engine has {needed.shape}"
    )


def is_finite(weight: HostArray, dtype: Any, digest: SourceSum | None = None) -> bool:
    """Whether every value is finite once it is cast to ``dtype``; ``digest`` gets each block.

    An IEEE float overflows the cast exactly if its bits, without the sign, are at least those of
    the smallest value that the cast makes infinite. Two maxima over the raw bits decide it: read as
    signed integers, the maximum is a positive value; read as unsigned ones, a negative value.
    """
    kind = weight.itemsize
    limit = _first_infinite(weight.dtype, np.dtype(dtype))
    sign = 1 << (8 * kind - 1)
    nbytes = digest.block_bytes(_DIGEST_BLOCK_BYTES, kind) if digest else _BLOCK_BYTES
    for block in mapped.blocks(weight, nbytes):
        if not (
            block.view(f"i{kind}").max() < limit and block.view(f"u{kind}").max() < sign + limit
        ):
            return False
        if digest:
            digest.add(block)
    return True


@cache
def _first_infinite(source: np.dtype[Any], target: np.dtype[Any]) -> int:
    """Return the bits of the smallest positive ``source`` value that ``target`` cannot hold."""
    kind = np.dtype(f"u{source.itemsize}")

    def is_infinite(bits: int) -> bool:
        with np.errstate(over="ignore"):
            value = np.array(bits, kind).view(source).astype(target)
        return not np.isfinite(value)

    return bisect_left(range(1 << (8 * source.itemsize - 1)), True, key=is_infinite)
