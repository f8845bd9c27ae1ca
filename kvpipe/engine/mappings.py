"""What the engine's model says of its own parameters: their paths and their weight mappings."""

from typing import Any

from kvpipe.errors import EngineError


def path_name(path: tuple[Any, ...]) -> str:
    """Return ``a.0.b`` for a pytree path; the last key of a variable is its value."""
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
    if keys and keys[-1] == "value":
        keys.pop()
    return ".".join(str(key) for key in keys)


def weight_mappings(model: Any) -> dict[str, Any]:
    """Return the model's Hugging Face name → WeightMapping; each model names the method itself.

    Raises:
        EngineError: the model has none, or several.
    """
    names = [n for n in dir(model) if n.startswith("_create_") and n.endswith("_weight_mappings")]
    if len(names) != 1:
        raise EngineError(f"{type(model).__name__} has {len(names)} weight mappings, one is needed")
    return getattr(model, names[0])()
