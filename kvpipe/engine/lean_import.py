"""Import the engine without modules that cost CPU seconds and that no run uses.

sglang-jax 0.0.2 imports fastapi for its HTTP server, and for the choices of one of that server's
options the parser of function calls in generated texts, with pydantic. A run uses neither.
transformers 4.55 reads the sources of all its models for the names that they export, and does so
twice.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, override

# Packages, with all that is in them, and modules.
_SERVER = ("fastapi", "sgl_jax.srt.function_call.function_call_parser")
_SCAN = "transformers.utils.import_utils"


@contextmanager
def lean() -> Iterator[None]:
    """Within this context the server's modules import as empty ones, and transformers scans once.

    After it, an import gives the real module. What was imported before stays as it is.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.emptied:
            sys.modules.pop(name, None)


class _Finder(MetaPathFinder):
    """Finds the modules whose import is made cheaper.

    Attributes:
        emptied: names of the empty modules that it found.
    """

    def __init__(self) -> None:
        self.emptied: list[str] = []

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _SERVER or fullname.partition(".")[0] in _SERVER:
            self.emptied.append(fullname)
            return ModuleSpec(fullname, _EmptyLoader(), is_package=True)
        if fullname != _SCAN:
            return None
        found = PathFinder.find_spec(fullname, path)
        if found is not None and found.origin is not None:
            found.loader = _ScanLoader(fullname, found.origin)
        return found


class _EmptyLoader(Loader):
    """Makes a module in which each name is an empty class: for annotations and base classes."""

    @override
    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: type(name, (), {})


class _ScanLoader(SourceFileLoader):
    @override
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _scan_once(module)


def _scan_once(import_utils: Any) -> None:
    """Let transformers find the exports of its models in a quarter of the CPU time.

    It remembers 128 of its 380 folders, of which a second scan finds none again; and it looks at
    each line of each file for the last one that begins with ``__all__``.
    """
    scan, names = import_utils.create_import_structure_from_path, import_utils.fetch__all__
    import_utils.create_import_structure_from_path = functools.cache(scan.__wrapped__)

    @functools.wraps(names)
    def names_in_the_end(text: str) -> Any:
        return names(text[text.rfind("\n__all__") + 1 :])

    import_utils.fetch__all__ = names_in_the_end
