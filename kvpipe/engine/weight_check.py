"""Refuse weights that are not the engine's, all of them by name, before anything is replaced.

Names and shapes come from the headers and cost nothing. Finding a value that is not finite takes
one pass over the bytes at the speed of memory: a swap that stopped half way could not give the
engine its old weights back.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from kvpipe.checkpoints import mapped
from kvpipe.engine.params import Param
from kvpipe.engine.placement import in_lane
from kvpipe.engine.weight_map import HostArray, Leaf
from kvpipe.errors import EngineError
from kvpipe.suggest import nearest

_FLOATS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)))
_BLOCK_BYTES = 1 << 20  # stays in a core's cache between the two reductions
_NAMED = 8  # as many names of each kind stand in the message
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old checkpoints hold and every model computes itself.
_COMPUTED = ".rotary_emb.inv_freq"


def check_weights(
    leaves: Mapping[str, Leaf], blueprint: Mapping[str, Param], weights: Mapping[str, HostArray]
) -> None:
    """Refuse host weights that are not complete, not of the engine's shapes or not finite.

    Args:
        leaves: where each parameter comes from, by path.
        blueprint: what each parameter has to be, by path.
        weights: arrays by Hugging Face name, in Hugging Face layout.

    Raises:
        EngineError: naming every weight that is missing, unexpected, misshapen, of a type that is
            no float, or that has a value which is not finite in the engine's dtype.
    """
    check_shapes(leaves, blueprint, weights)
    # The largest first, so that no lane is left with one of them at the end.
    by_size = sorted(leaves.values(), key=lambda leaf: -weights[leaf.source].nbytes)
    checks = {
        leaf.source: in_lane(i, is_finite, weights[leaf.source], blueprint[leaf.path].dtype)
        for i, leaf in enumerate(by_size)
    }
    refuse_infinite([leaf.source for leaf in leaves.values() if not checks[leaf.source].result()])


def check_shapes(
    leaves: Mapping[str, Leaf], blueprint: Mapping[str, Param], weights: Mapping[str, Any]
) -> None:
    """Refuse weights, on the host or on the devices, that are not complete or not of the shapes.

    Args:
        leaves: where each parameter comes from, by path.
        blueprint: what each parameter has to be, by path.
        weights: arrays by Hugging Face name, in Hugging Face layout.

    Raises:
        EngineError: naming every weight that is missing, unexpected, misshapen or no float.
    """
    sources = {leaf.source for leaf in leaves.values()}
    missing = sorted(sources - set(weights))
    unexpected = [n for n in weights if n not in sources and not _is_spare(n, weights, sources)]
    misshapen = [_misshapen(leaf, blueprint[leaf.path], weights) for leaf in leaves.values()]
    _refuse(
        (f"{len(missing)} of {len(sources)} weights are missing", _hinted(missing, weights)),
        (f"{len(unexpected)} are not the engine's", _hinted(unexpected, sources)),
        ("of another shape or type", [text for text in misshapen if text]),
    )


def refuse_infinite(names: list[str]) -> None:
    """Refuse the weights of these names, if there are any: they have values that are not finite.

    Raises:
        EngineError: with the names.
    """
    _refuse(("with values that are not finite", [repr(name) for name in names]))


def _refuse(*kinds: tuple[str, list[str]]) -> None:
    texts = []
    for kind, names in kinds:
        if names:
            rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            texts.append(f"{kind}: {', '.join(names[:_NAMED])}{rest}")
    if texts:
        raise EngineError(f"the weights are refused; {'; '.join(texts)}")


def _hinted(names: list[str], valid: Iterable[str]) -> list[str]:
    """Return the names quoted, the first with what it may have been meant to be."""
    if not names:
        return []
    first, *rest = names
    return [f"{first!r} ({nearest(first, valid)})", *map(repr, rest)]


def _is_spare(name: str, weights: Mapping[str, Any], sources: set[str]) -> bool:
    """Whether a weight that no parameter takes may be there: it says nothing new."""
    if name.endswith(_COMPUTED):
        return True
    if name != _HEAD or _EMBEDDING not in weights or _HEAD in sources:
        return False
    return np.array_equal(weights[_HEAD], weights[_EMBEDDING])  # a tied head, written out


def _misshapen(leaf: Leaf, needed: Param, weights: Mapping[str, Any]) -> str:
    if leaf.source not in weights:
        return ""
    given = weights[leaf.source]
    if given.dtype not in _FLOATS:
        return f"weight {leaf.source!r} has dtype {given.dtype}"
    fitted = leaf.fitted_shape(given.shape)
    if fitted == needed.shape:
        return ""
    return (
        f"weight {leaf.source!r} has shape {given.shape}, which gives {fitted} for "
        f"{leaf.path!r}, where the engine has {needed.shape}"
    )


def is_finite(weight: HostArray, dtype: Any) -> bool:
    """Whether every value is finite once it is cast to ``dtype``.

    An IEEE float is too large exactly if its bits, without the sign, are at least those of the
    first value that the cast makes infinite. So two maxima over the bits decide: taken as signed
    numbers only the positive values count, as unsigned ones the negative values come out on top.
    """
    kind = weight.itemsize
    limit = _first_infinite(weight.dtype, np.dtype(dtype))
    sign = 1 << (8 * kind - 1)
    return all(
        block.view(f"i{kind}").max() < limit and block.view(f"u{kind}").max() < sign + limit
        for block in mapped.blocks(weight, _BLOCK_BYTES)
    )


@cache
def _first_infinite(source: np.dtype[Any], target: np.dtype[Any]) -> int:
    """Return the bits of the least positive ``source`` value that ``target`` cannot hold."""
    kind = np.dtype(f"u{source.itemsize}")

    def is_infinite(bits: int) -> bool:
        with np.errstate(over="ignore"):
            value = np.array(bits, kind).view(source).astype(target)
        return not np.isfinite(value)

    return bisect_left(range(1 << (8 * source.itemsize - 1)), True, key=is_infinite)
