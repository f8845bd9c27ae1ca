"""Name the owner of each live array that is in no pool, by the path of attributes to it.

Arrays that the engine holds besides weights and KV cache (random keys, tables) are named when it is
ready, with their bytes. After its first generate the arrays of its own objects, such as the
metadata of attention, and those in the caches of its modules are named too. Its idle threads hold
their last batch in local variables until the next one. Any other array has no owner. kvpipe's own
objects own nothing here.
"""

import gc
import inspect
import re
import sys
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from types import CellType, FrameType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvpipe.engine import kv_cache, memory, params
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import EngineError

LAST_BATCH = "last batch"
_ENGINE_MODULES = "sgl_jax."
Path = tuple[str, ...]
"""Names that lead from one of the roots to an object, each as the ending of what is before it."""


@dataclass
class _Node:
    """A name in paths: the path that ends with it, if one does, and the names after it."""

    ends: Path | None = None
    inner: "Paths" = field(default_factory=dict)


Paths = dict[str, _Node]
"""Paths as a tree of their names."""

_CONTAINERS = (list, tuple, set, frozenset, deque)
# Most of what an object refers to; nothing is behind it.
_LEAVES = frozenset({str, bytes, int, float, bool, type(None)})
# Those of flax and jax describe structure: most objects of an engine are theirs, and none is an array.
_DESCRIPTIONS = (nnx.GraphDef, jax.tree_util.PyTreeDef)
_ATOMS = (
    *(str, bytes, int, float, type(None), type, ModuleType, FrameType),
    *(np.ndarray, np.generic, *_DESCRIPTIONS),
)
# Their children are no attributes.
_OTHERWISE_NAMED = (dict, *_CONTAINERS, FunctionType, MethodType, partial)
_MOST_REFERRERS = 3
_MOST_DESCRIBED = 5


@dataclass
class Owners:
    """The arrays that an engine may hold besides its pools.

    Attributes:
        engine: the engine.
        sizes: bytes over all devices that each owner has had from the start, by its path.
        arrays: the arrays themselves, as another path may become the shorter one.
        after_generate: owners since the first generate; their bytes follow the batch.
        paths: where arrays were found in the engine's objects so far.
        thread_paths: the same in the local variables of its threads.
    """

    engine: SglangEngine
    sizes: dict[str, int] = field(default_factory=dict)
    arrays: "weakref.WeakValueDictionary[int, jax.Array]" = field(
        default_factory=weakref.WeakValueDictionary
    )
    after_generate: set[str] | None = None
    paths: Paths = field(default_factory=dict)
    thread_paths: Paths = field(default_factory=dict)

    @classmethod
    def when_ready(cls, engine: SglangEngine) -> "Owners":
        """Name the owners of the engine's arrays once it is ready.

        Raises:
            EngineError: a part of it is as large as a layer of the KV cache: a pool that no plan
                counts.
        """
        pools = params.parameters(engine).values(), kv_cache.buffers(engine)
        owners, groups = cls(engine), memory.measure(*pools, {})[1]
        paths, _ = owners._held(groups)
        for array in (array for group in groups for array in group):
            if (path := paths.get(id(array))) is not None:
                owners.sizes[path] = owners.sizes.get(path, 0) + _nbytes(array)
                owners.arrays[id(array)] = array
        _refuse_pools(owners.sizes, min(map(_nbytes, kv_cache.buffers(engine))))
        return owners

    def attribute(
        self, groups: Sequence[Sequence[jax.Array]]
    ) -> tuple[dict[str, int], list[jax.Array]]:
        """Return the bytes of each owner, and the arrays that have none.

        Args:
            groups: live arrays that are in no pool; those of a group share a buffer.
        """
        held, last = self._held(groups)
        if self.engine.generated and self.after_generate is None:
            self.after_generate = {*held.values()} - self.sizes.keys()
        owned: dict[str, int] = {}
        unowned = []
        for group in groups:
            paths = [held[id(a)] for a in group if id(a) in held and self._may_hold(held[id(a)], a)]
            in_thread = any(id(a) in last for a in group) and not any(id(a) in held for a in group)
            if owner := next(iter(paths), LAST_BATCH if in_thread else None):
                owned[owner] = owned.get(owner, 0) + _nbytes(group[0])
            else:
                unowned.append(group[0])
        return owned, unowned

    def _held(
        self, groups: Sequence[Sequence[jax.Array]]
    ) -> tuple[dict[int, str], Collection[int]]:
        """Return the paths of the arrays that the engine's objects hold, and ids of its threads' ones.

        Look first where such arrays were before: a walk over all objects takes tens of milliseconds.
        """
        arrays = [array for group in groups for array in group]
        cached = map(_module_cache, (n for n in self.paths if n.startswith(_ENGINE_MODULES)))
        roots = [*_roots(self.engine), *cached]
        held = _found_at(self.paths, arrays, roots)
        last = _found_at(self.thread_paths, arrays, _thread_locals(), _any_index)
        found = held.keys() | last.keys()
        missing = [a for group in groups if found.isdisjoint(map(id, group)) for a in group]
        more_held, more_last = _held_by(self.engine, missing)
        for path in more_held.values():
            _add(path, self.paths)
        for path in more_last.values():
            # The next batch may be at another place of a thread's list.
            _add(tuple(map(_any_index, path)), self.thread_paths)
        names = {key: _name_of_path(path) for key, path in (held | more_held).items()}
        return names, last.keys() | more_last.keys()

    def _may_hold(self, path: str, array: jax.Array) -> bool:
        return (
            self.arrays.get(id(array)) is array
            or self.sizes.get(path) == _nbytes(array)
            or path in (self.after_generate or ())
            # Its modules cache arrays for each shape of a batch.
            or (self.engine.generated and path.startswith(_ENGINE_MODULES))
        )


def describe(arrays: Sequence[jax.Array], found: Iterable[Any] = ()) -> tuple[str, ...]:
    """Return shape, dtype, sharding and referrers of each of the first arrays.

    Args:
        arrays: arrays without an owner.
        found: further containers of the caller's, which are no answer.
    """
    if not arrays:
        return ()
    gc.unfreeze()  # frozen objects are no referrers to the collector
    ours = {id(container) for container in (arrays, *found)}
    texts = tuple(_described(array, ours) for array in islice(arrays, _MOST_DESCRIBED))
    memory.exclude_what_lives()
    return texts


def _described(array: jax.Array, ours: Set[int]) -> str:
    names = [_name_of(r, array) for r in gc.get_referrers(array) if id(r) not in ours]
    # Bare containers come last: those of a count that has just ended are among them.
    names = sorted(filter(None, names), key=lambda name: name.startswith("a "))[:_MOST_REFERRERS]
    spec = getattr(array.sharding, "spec", type(array.sharding).__name__)
    return (
        f"{array.dtype}{list(array.shape)}, {_nbytes(array):,} bytes, {spec} on "
        f"{len(array.sharding.device_set)} devices, held by {' and '.join(names) or 'no Python object'}"
    )


def _name_of(referrer: Any, array: jax.Array) -> str:
    """Describe a referrer: its class, the attribute, key or index, and its own owner."""
    if isinstance(referrer, (FrameType, GeneratorType)):
        return ""
    kind = f"{type(referrer).__module__}.{type(referrer).__qualname__}"
    place = next((name for name, child in _children(referrer) if child is array), "")
    if not isinstance(referrer, (dict, list, tuple, CellType)):
        return kind + place
    # A container says little: name the object or module that has it as an attribute.
    for holder in gc.get_referrers(referrer):
        if isinstance(holder, ModuleType):
            return holder.__name__ + place
        owner = f"{type(holder).__module__}.{type(holder).__qualname__}"
        if getattr(holder, "__dict__", None) is referrer:
            return f"{owner}.{place[2:-2]}"
        for name, child in _children(holder) if hasattr(holder, "__dict__") else ():
            if child is referrer:
                return f"{owner}{name}{place}"
    return f"a {kind}{place}"


def _refuse_pools(sizes: Mapping[str, int], layer_bytes: int) -> None:
    """Refuse arrays that are together as large as a layer of the KV cache; a plan lacks them."""
    groups: dict[str, int] = {}
    for path, size in sizes.items():
        name = re.sub(r"\[\d+\]", "[...]", path)
        groups[name] = groups.get(name, 0) + size
    for name, size in groups.items():
        if size >= layer_bytes:
            raise EngineError(
                f"the engine holds {size:,} bytes in {name}, a pool that kvpipe does not know: no plan "
                "counts it and no phase frees it"
            )


def _name_of_path(path: Path) -> str:
    """Return a path as text; that of a module's cache without the key in it."""
    text = "".join(path)
    return text.partition("[")[0] if text.startswith(_ENGINE_MODULES) else text


def _roots(engine: SglangEngine) -> list[tuple[str, Any]]:
    return [("runner", engine.runner), ("scheduler", engine.scheduler), ("engine", engine.engine)]


def _found_at(
    paths: Paths,
    arrays: Iterable[jax.Array],
    roots: Iterable[tuple[str, Any]],
    known_as: Callable[[str], str] = str,
) -> dict[int, Path]:
    """Return the paths, of these, that now lead from the roots to one of the arrays, by its id.

    ``known_as`` gives a name as the paths have it.
    """
    wanted = {id(array) for array in arrays}
    found: dict[int, Path] = {}
    ahead: deque[tuple[Paths, Iterable[tuple[str, Any]]]] = deque([(paths, roots)])
    while ahead:
        names, children = ahead.popleft()
        for name, child in children:
            if (node := names.get(known_as(name))) is None:
                continue
            if node.ends is not None and id(child) in wanted:
                found.setdefault(id(child), node.ends)
            if node.inner:
                ahead.append((node.inner, _children_of(child, node.inner)))
    return found


def _add(path: Path, paths: Paths) -> None:
    inside, node = paths, _Node()
    for name in path:
        node = inside.setdefault(name, _Node())
        inside = node.inner
    node.ends = path


def _any_index(name: str) -> str:
    return "[...]" if name[:1] == "[" and name[1:-1].isdigit() else name


def _held_by(
    engine: SglangEngine, arrays: Sequence[jax.Array]
) -> tuple[dict[int, Path], dict[int, Path]]:
    """Return the paths at which the engine's objects and modules hold the arrays, and its threads."""
    if not arrays:  # at most steps all are where they were
        return {}, {}
    wanted = {id(array) for array in arrays}
    seen: dict[int, Any] = {}
    held = _walk(_roots(engine), wanted, seen)
    held |= _walk(_module_caches(), wanted - held.keys(), seen)
    return held, _walk(_thread_locals(), wanted - held.keys(), seen)


def _walk(
    roots: Iterable[tuple[str, Any]], wanted: set[int], seen: dict[int, Any]
) -> dict[int, Path]:
    """Return the shortest path to each wanted object.

    Args:
        roots: where to begin, each with its name.
        wanted: ids of the objects.
        seen: objects that were visited, kept alive so that no id is used again; it grows.
    """
    paths: dict[int, Path] = {}
    ahead: deque[Any] = deque()
    for name, thing in roots:
        paths.setdefault(id(thing), (name,))
        ahead.append(thing)
    found: list[Any] = []
    reached_from: dict[int, Any] = {}
    while ahead and len(found) < len(wanted):
        thing = ahead.popleft()
        if id(thing) in seen or _is_atom(type(thing)) or _is_ours(thing):
            continue
        seen[id(thing)] = thing
        if id(thing) in wanted:
            found.append(thing)
            continue
        for child in _referents(thing):
            if type(child) not in _LEAVES and id(child) not in seen:
                reached_from.setdefault(id(child), thing)
                ahead.append(child)
    return {id(thing): _path_to(thing, reached_from, paths) for thing in found}


def _path_to(thing: Any, reached_from: Mapping[int, Any], paths: dict[int, Path]) -> Path:
    """Return the path to a thing; only those that were found get names, which take time.

    Args:
        thing: the object.
        reached_from: the object from which a walk came to each other one, by id.
        paths: the paths that are known, by id; it grows.
    """
    if (path := paths.get(id(thing))) is None:
        parent = reached_from[id(thing)]
        name = next((name for name, child in _children(parent) if child is thing), "")
        path = paths[id(thing)] = (*_path_to(parent, reached_from, paths), name)
    return path


def _referents(thing: Any) -> Iterable[Any]:
    """Return the objects that :func:`_children` names, without their names."""
    if isinstance(thing, dict):
        return list(dict.values(thing))
    if type(thing) is FunctionType:
        return thing.__closure__ or ()
    referents = gc.get_referents(thing)
    if not type(thing).__dictoffset__ or isinstance(thing, _CONTAINERS):
        return referents
    own = _dict_of(thing)
    return [*own.values(), *(r for r in referents if r is not own)] if own else referents


# A walk asks of thousands of things, which have few classes.
@cache
def _is_atom(kind: type) -> bool:
    return issubclass(kind, _ATOMS)


def _is_ours(thing: Any) -> bool:
    """Whether a thing is kvpipe's: a function of it, or an instance of a class of it."""
    if type(thing) is MethodType:
        thing = thing.__func__
    return _is_our_module(
        thing.__module__ if type(thing) is FunctionType else type(thing).__module__
    )


@cache
def _is_our_module(name: object) -> bool:
    return str(name).partition(".")[0] == "kvpipe"


def _children(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that ``thing`` refers to, with the end of the path; runs no code of it."""
    if isinstance(thing, dict):
        yield from ((f"[{key!r:.40}]", value) for key, value in list(dict.items(thing)))
    elif isinstance(thing, _CONTAINERS):
        yield from ((f"[{i}]", value) for i, value in enumerate(list(thing)))
    elif isinstance(thing, FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield from ((f".{name}", cell) for name, cell in cells)
    elif isinstance(thing, MethodType):
        yield from (("", thing.__self__), ("", thing.__func__))
    elif isinstance(thing, partial):
        yield from ((".func", thing.func), (".args", thing.args), ("", thing.keywords))
    else:
        yield from _attributes(thing)
        yield from (("", child) for child in gc.get_referents(thing))


def _children_of(thing: Any, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the children of ``thing`` that may have one of the names, as the paths have it.

    An object can have hundreds of attributes: they are looked up.
    """
    if isinstance(thing, _OTHERWISE_NAMED) or "" in names:
        yield from _children(thing)
        return
    own, slots = _dict_of(thing), _slots(type(thing))
    for name in names:
        if name[1:] in own:
            yield name, own[name[1:]]
        elif name[1:] in slots:
            with suppress(AttributeError):
                yield name, slots[name[1:]].__get__(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    yield from ((f".{name}", value) for name, value in list(_dict_of(thing).items()))
    for name, slot in _slots(type(thing)).items():
        try:
            yield f".{name}", slot.__get__(thing)
        except AttributeError:
            continue


def _dict_of(thing: Any) -> dict[str, Any]:
    """Return the attributes of an instance; empty if it has none of its own."""
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return own if isinstance(own, dict) else {}


@cache
def _slots(kind: type) -> Mapping[str, Any]:
    """Return the slots of a class and its bases by their names."""
    slots = [item for base in kind.__mro__ for item in vars(base).items()]
    return {name: slot for name, slot in slots if inspect.ismemberdescriptor(slot)}


def _module_caches() -> list[tuple[str, Any]]:
    """Return the containers that are global in modules of sgl_jax, each with its full name."""
    modules = [(name, m) for name, m in sys.modules.items() if name.startswith(_ENGINE_MODULES)]
    return [
        (f"{name}.{variable}", value)
        for name, module in modules
        for variable, value in vars(module).items()
        if isinstance(value, (dict, list, set, jax.Array)) and not variable.startswith("__")
    ]


def _module_cache(name: str) -> tuple[str, Any]:
    """Return one of them by its name, None in its place if the module no longer has it."""
    module, _, variable = name.rpartition(".")
    return name, getattr(sys.modules.get(module), variable, None)


def _thread_locals() -> list[tuple[str, Any]]:
    """Return the local variables of the functions of sgl_jax that threads are in."""
    found: list[tuple[str, Any]] = []
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            of_engine = str(frame.f_globals.get("__name__")).partition(".")[0] == "sgl_jax"
            if of_engine and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
                held: Any = frame.f_locals
                found += [(f"{frame.f_code.co_name}.{name}", v) for name, v in held.items()]
                if isinstance(held, dict):  # a copy, before Python 3.13, that the frame would keep
                    held.clear()
            frame = frame.f_back
    return found


def _nbytes(array: jax.Array) -> int:
    return memory.shard_bytes(array) * len(array.sharding.device_set)
