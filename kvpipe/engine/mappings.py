"""Read the parameter paths and weight mappings that the engine's model defines itself."""

from typing import Any

from kvpipe.errors import EngineError


def path_name(path: tuple[Any, ...]) -> str:
    """Return a pytree path as ``a.0.b``, without the ``value`` key that ends a variable's path."""
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
    if keys and keys[-1] == "value":
        keys.pop()
    return ".".join(str(key) for key in keys)


def weight_mappings(model: Any) -> dict[str, Any]:
    """Return the model's map from Hugging Face name to WeightMapping.

    The method's name contains the model's, so it is found by its pattern.

    Raises:
        EngineError: the model has no such method, or several.
    """
    names = [n for n in dir(model) if n.startswith("_create_") and n.endswith("_weight_mappings")]
    if len(names) != 1:
        raise EngineError(f"{type(model).__name__} has {len(names)} weight mappings, not 1")
    return getattr(model, names[0])()
