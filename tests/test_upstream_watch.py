"""The upstream watch: what it compares, what it derives, and that the committed facts are today's."""

import ast
import inspect
import json
import subprocess
import sys

import pytest

from tests.helpers_config import ROOT
from tools.upstream_watch import changes, patches, touched
from tools.upstream_watch.__main__ import SUPPORTED, _broken

FACTS = json.loads(SUPPORTED.read_text())
OBSERVE = """
import json, os, sys, tempfile
from pathlib import Path
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
from kvpipe.checkpoints.tiny import ensure
from kvpipe.engine import compat
from tests.golden.answers import spec
from tools.upstream_watch import facts
with compat.pytree_registered_twice():
    import sgl_jax.srt.layers.attention.native_backend
with tempfile.TemporaryDirectory() as scratch:
    found = facts._observed(ensure(spec(facts.MODELS[0]), Path(scratch)))
    Path(sys.argv[1]).write_text(json.dumps(found))
os._exit(0)
"""


def lines(before, after):
    return list(changes.lines(before, after))


def test_equal_facts_are_unchanged():
    assert lines(FACTS, FACTS) == [f"{name}: unchanged" for name in FACTS]


def test_what_is_new_gone_and_different_is_reported_with_its_values():
    before = {"parts": {"same": "1", "other": "2", "lost": "3"}}
    after = {"parts": {"same": "1", "other": "two", "found": "4"}}
    assert lines(before, after) == [
        "parts: 3 changed",
        "  differs  other: 2 → two",
        "  gone     lost: 3",
        "  new      found: 4",
    ]


def test_a_tree_of_parameters_that_moved_is_one_line_and_its_changes_are_listed_at_its_new_path():
    before = {"p": {"transformer.a": "1", "transformer.b.c": "2", "head": "3"}}
    after = {"p": {"model.a": "1", "model.b.c": "two", "head": "3"}}
    assert lines(before, after) == [
        "p: 2 changed",
        "  moved    transformer.* → model.* (2)",
        "  differs  model.b.c: 2 → two",
    ]


def test_a_path_that_moved_is_not_reported_again_in_the_mappings_to_it():
    before = {"p": {"old.a": "1"}, "m": {"hf.a": "to='old.a'", "hf.b": "to='old.a', x=1"}}
    after = {"p": {"new.a": "1"}, "m": {"hf.a": "to='new.a'", "hf.b": "to='new.a', x=2"}}
    assert lines(before, after)[2:] == [
        "m: 1 changed",
        "  differs  hf.b: to='new.a', x=1 → to='new.a', x=2",
    ]


def test_of_two_signatures_the_parameters_that_differ_are_listed():
    before = {"s": {"f": "function(a, b=(1, 2), c=3)", "g": "function(a, b)", "h": "int"}}
    after = {"s": {"f": "function(a, b=(1, 3), d)", "g": "function(b, a)", "h": "class()"}}
    assert lines(before, after)[1:] == [
        "  differs  f: without b=(1, 2), c=3; with b=(1, 3), d",
        "  differs  g: its parameters in another order",
        "  differs  h: int → class()",
    ]


def test_a_section_that_could_not_be_gathered_shows_why():
    assert lines({"p": {"a": "1"}}, {"p": {"failed": "ImportError: x"}})[-1] == (
        "  new      failed: ImportError: x"
    )


def test_what_does_not_work_with_a_version_is_not_taken_for_supported():
    assert _broken(FACTS) == []
    failed = FACTS | {
        "steps": {"start": "works", "flush": "E: x"},
        "tiny: KV cache": {"failed": "y"},
    }
    assert _broken(failed) == ["tiny: KV cache: y", "flush: E: x"]


def test_every_patch_has_a_probe_of_its_defect():
    tree = ast.parse((touched.ADAPTER / "compat.py").read_text())
    patched = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "Defect:" in (ast.get_docstring(node) or "")
    }
    assert patched == set(patches.PROBES) == set(FACTS["compat patches"])


def test_the_names_that_the_adapter_imports_are_the_committed_ones():
    """A new import of sglang-jax must go into the facts: make upstream-watch ARGS=--write."""
    trees = [ast.parse(path.read_text()) for path in touched.ADAPTER.glob("*.py")]
    names = {name for tree in trees for name in touched._names_in(tree)}
    assert names == set(FACTS["imported names"])
    assert "sgl_jax.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers" in names


def test_the_names_in_a_source_are_found_in_each_of_their_forms():
    source = """
def f():
    from sgl_jax.a import b
    from sgl_jax.c import D as e
    from other import g
    b.read, hasattr(b, "asked"), g.not_ours
    for owner, name, value in ((b, "replaced", 1), (b.Cls, "method", 2)): ...
"""
    assert set(touched._names_in(ast.parse(source))) == {
        *("sgl_jax.a.b", "sgl_jax.c.D", "sgl_jax.a.b.read", "sgl_jax.a.b.asked"),
        *("sgl_jax.a.b.replaced", "sgl_jax.a.b.Cls", "sgl_jax.a.b.Cls.method"),
    }


def test_a_description_has_the_signature_without_annotations_and_addresses():
    def function(a: int, *, b: object = print) -> str: ...

    class Plain:
        def __init__(self, size: int = 3) -> None: ...

    assert touched.describe(function) == "function(a, *, b=<built-in function print>)"
    assert touched.describe(Plain) == "class(size=3)"
    assert touched.describe(Plain()) == "Plain"
    assert " at 0x" in str(inspect.signature(lambda f=function: f))
    assert " at 0x" not in touched.describe(lambda f=function: f)


@pytest.mark.slow
@pytest.mark.nightly(finds="a name of the engine that the adapter reaches only while it runs")
def test_the_adapter_touches_what_is_committed_and_all_its_steps_work(tmp_path):
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", OBSERVE, str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps, attributes = json.loads(file.read_text())
    assert steps == FACTS["steps"]
    assert set(steps.values()) == {"works"}
    assert lines({"touched": FACTS["touched attributes"]}, {"touched": attributes}) == [
        "touched: unchanged"
    ]
