"""Compare the tensors that a model needs with those that are given, by name and shape."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvpipe.checkpoints import HOST_DTYPES
from kvpipe.suggest import nearest

_NAMED = 8  # names of each kind listed in a message
# Buffers that old checkpoints contain and every model computes itself.
COMPUTED = ".rotary_emb.inv_freq"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def differences(
    needed: Iterable[str], given: Iterable[str], misshapen: Sequence[str], spare: Iterable[str] = ()
) -> list[str]:
    """Return one text for each kind of difference, with the first names of each.

    ``misshapen`` has a text for each tensor of another shape or type; ``spare`` names may be given
    although they are not needed.
    """
    names, there = set(needed), set(given)
    missing = sorted(names - there)
    unexpected = [name for name in given if name not in names.union(spare)]
    kinds = (
        (f"{len(missing)} of {len(names)} weights are missing", _hinted(missing, there)),
        (f"{len(unexpected)} are not the engine's", _hinted(unexpected, names)),
        ("of another shape or type", misshapen),
    )
    return [listed(kind, found) for kind, found in kinds if found]


def listed(kind: str, names: Sequence[str]) -> str:
    """Return the first of the names below their kind."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{kind}: {', '.join(names[:_NAMED])}{rest}"


def misshapen(name: str, shape: tuple[int, ...], tensor: Any) -> str:
    """Return why a tensor is not one of floats of ``shape``; empty if it is."""
    if wrong := wrong_dtype(name, tensor):
        return wrong
    if tensor.shape == shape:
        return ""
    return f"weight {name!r} has shape {tensor.shape}, the config gives {shape}"


def wrong_dtype(name: str, tensor: Any) -> str:
    """Return why a tensor is not one of floats; empty if it is."""
    return "" if str(tensor.dtype) in HOST_DTYPES else f"weight {name!r} has dtype {tensor.dtype}"


def computed(names: Mapping[str, Any]) -> set[str]:
    """Return the names of buffers that every model computes itself."""
    return {name for name in names if name.endswith(COMPUTED)}


def _hinted(names: list[str], valid: Iterable[str]) -> list[str]:
    """Return the names quoted, the first with the nearest valid names."""
    if not names:
        return []
    first, *rest = names
    return [f"{first!r} ({nearest(first, valid)})", *map(repr, rest)]
