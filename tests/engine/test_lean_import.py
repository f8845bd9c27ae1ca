"""Modules that the engine is imported without; transformers still exports the same names."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpipe.engine.lean_import import lean


@contextmanager
def anew(*packages: str) -> Iterator[None]:
    """Import packages anew within the context, and leave those that were imported before."""

    def imported() -> dict[str, Any]:
        return {name: sys.modules[name] for name in sys.modules if name.split(".")[0] in packages}

    before = imported()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in imported():
            del sys.modules[name]
        sys.modules.update(before)


def test_the_engine_is_imported_without_its_http_server(four_devices: None) -> None:
    from kvpipe.engine import compat

    for first in (compat.shards_explicitly, compat.import_engine):
        with anew("sgl_jax", "fastapi"):
            first()
            response = sys.modules["sgl_jax.srt.utils.common_utils"].ORJSONResponse
            assert (response.__module__, dir(response)) == (lean.__module__, dir(type("", (), {})))
            assert not any(name.startswith("fastapi") for name in sys.modules)


def test_the_parser_of_function_calls_is_empty_while_the_engine_is_imported(
    four_devices: None,
) -> None:
    from kvpipe.engine import compat

    name = "sgl_jax.srt.function_call.function_call_parser"
    with anew("sgl_jax"):
        compat.import_engine()
        assert not any("entrypoints.openai" in module for module in sys.modules)
        parser = sys.modules["sgl_jax.srt.server_args"].FunctionCallParser
        assert parser.__module__ == lean.__module__
        with pytest.warns(DeprecationWarning):
            real = importlib.import_module(name)
        assert real.FunctionCallParser.__module__ == name


def test_fastapi_is_empty_within_the_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with anew("fastapi"):
        with lean():
            import fastapi

            assert fastapi.Request | None
        found = importlib.util.find_spec("fastapi")
        assert found is not None
        assert found.origin is not None
    monkeypatch.setitem(sys.modules, "fastapi", pytest)
    with lean():
        import fastapi
    assert fastapi is sys.modules["fastapi"] is pytest


def test_the_names_that_transformers_exports_are_those_that_it_finds_by_itself(
    four_devices: None,
) -> None:
    with anew("transformers"):
        with lean():
            from transformers.utils import import_utils
        scan: Any = import_utils.fetch__all__
    models = Path(import_utils.__file__).parents[1] / "models"
    texts = [path.read_text("utf-8") for path in models.glob("*/configuration_*.py")]
    assert len(texts) > 300
    assert [scan(text) for text in texts] == [scan.__wrapped__(text) for text in texts]
