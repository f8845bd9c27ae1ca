"""The parts of sglang-jax that the adapter touches, derived rather than listed by hand.

Imported names are read from the adapter's source. Attributes of live objects are observed: while
the adapter works, each class of sglang-jax whose objects it reaches records the attributes that
functions of ``kvpipe/engine`` access.
"""

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvpipe.engine

ADAPTER = Path(kvpipe.engine.__path__[0])
UPSTREAM = "sgl_jax"
ABSENT = "absent"
_ADAPTER_FILES = f"{ADAPTER}{os.sep}"
_NOTHING = type(None).__name__
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def describe(value: Any) -> str:
    """Return the signature of a class or function, and the type of everything else."""
    if not inspect.isclass(value) and not inspect.isroutine(value):
        return type(value).__name__
    kind = "class" if inspect.isclass(value) else "function"
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # written in C, or without a signature
        return kind
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    return kind + _ADDRESS.sub("", text)


def imported_names() -> dict[str, str]:
    """Return each name of sglang-jax that the adapter's source uses, with its current description.

    ``from sgl_jax.a.b import Name`` gives ``sgl_jax.a.b.Name``; an imported module gives the
    attributes that are read or looked up by name.
    """
    found: set[str] = set()
    for path in sorted(ADAPTER.glob("*.py")):
        found |= set(_names_in(ast.parse(path.read_text(encoding="utf-8"))))
    return {name: _now(name) for name in sorted(found)}


def _names_in(tree: ast.AST) -> Iterator[str]:
    imports = [
        (alias.asname or alias.name, f"{node.module}.{alias.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(UPSTREAM + ".")
        for alias in node.names
    ]
    yield from (full for _, full in imports)
    for local, full in imports:
        for node in ast.walk(tree):
            if name := _attribute_of(local, node):
                yield f"{full}.{name}"


def _attribute_of(local: str, node: ast.AST) -> str | None:
    """Return the attribute of the name ``local`` that a source node uses, if any."""
    match node:
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == local:
            return name
        # hasattr(owner, "name"), replaced(owner, "name", value), and (owner, "name", value) for it.
        case (
            ast.Call(args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_])
            | ast.Tuple(elts=[ast.Name(id=owner), ast.Constant(value=str(name)), *_])
        ) if owner == local:
            return name
        # (module.Class, "name", value)
        case ast.Tuple(
            elts=[
                ast.Attribute(value=ast.Name(id=owner), attr=cls),
                ast.Constant(value=str(name)),
                *_,
            ]
        ) if owner == local:
            return f"{cls}.{name}"
    return None


def _now(name: str) -> str:
    """Return the description that a dotted name has in the installed version."""
    parts = name.split(".")
    owner: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(owner, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError:
                return ABSENT
        owner = getattr(owner, part)
    return describe(owner)


class Observer:
    """Record the attributes of sglang-jax's objects that the adapter reads, and describe them."""

    def __init__(self) -> None:
        self._got: dict[str, set[str]] = {}
        self._classes: dict[Any, tuple[Any, Any]] = {}

    @property
    def seen(self) -> dict[str, str]:
        """The attributes and their descriptions; None only for those that were always None."""
        return {
            name: " | ".join(sorted(got - {_NOTHING} or got))
            for name, got in sorted(self._got.items())
        }

    @contextmanager
    def watching(self, *classes: type) -> Iterator[None]:
        """Observe objects of ``classes``, and of every class whose objects they lead to."""
        for cls in classes:
            self._watch(cls)
        try:
            yield
        finally:
            for cls, (get, put) in self._classes.items():
                cls.__getattribute__, cls.__setattr__ = get, put

    def _watch(self, cls: Any) -> None:
        from flax import nnx

        # A model's parameters are compared by path; flax tracks attributes itself.
        if cls in self._classes or issubclass(cls, nnx.Module):
            return
        get, put = cls.__getattribute__, cls.__setattr__
        self._classes[cls] = get, put

        def getting(this: Any, name: str) -> Any:
            try:
                value = get(this, name)
            except AttributeError:
                if _asked_by_adapter(name):
                    self._note(cls, name, ABSENT)
                raise
            if _asked_by_adapter(name):
                self._note(cls, name, describe(value))
                if type(value).__module__.startswith(UPSTREAM):
                    self._watch(type(value))
            return value

        def putting(this: Any, name: str, value: Any) -> None:
            put(this, name, value)
            if _asked_by_adapter(name):
                self._note(cls, name, describe(value))

        cls.__getattribute__, cls.__setattr__ = getting, putting

    def _note(self, cls: type, name: str, what: str) -> None:
        """Record an attribute's description; the adapter's patched methods count as upstream's."""
        got = self._got.setdefault(f"{cls.__module__}.{cls.__qualname__}.{name}", set())
        if not (got and what.startswith("function")):
            got.add(what)


def _asked_by_adapter(name: str) -> bool:
    """Return whether a function of the adapter called the caller of this function."""
    file = sys._getframe(2).f_code.co_filename
    return file.startswith(_ADAPTER_FILES) and not name.startswith("__")
