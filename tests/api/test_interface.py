"""The public interface: what it is, and that importing it costs nothing. No engine."""

import json
import subprocess
import sys

import pytest

import kvpipe
from tests.helpers_config import ROOT

GUIDE = (ROOT / "docs/guide/attach.md").read_text()
LOOK = """
import json, sys
before = set(sys.modules)
import kvpipe
new = sorted(set(sys.modules) - before)
errors = [issubclass(getattr(kvpipe, name), kvpipe.KvpipeError) for name in kvpipe.__all__ if "Error" in name]
print(json.dumps([new, all(errors), "jax" in sys.modules]))
"""


def test_the_public_interface_has_not_changed_by_accident():
    """A name that goes, or one that is new, is a decision: the guide and the changelog say it."""
    assert kvpipe.__all__ == [
        "Attached",
        "CheckFailed",
        "EngineError",
        "InputError",
        "KvpipeError",
        "Ledger",
        "OutOfMemory",
        "PhaseError",
        "RecordError",
        "WeightsError",
        "attach",
        "engine_patches",
        "open_checkpoint",
        "record",
    ]
    assert set(kvpipe.__all__) <= set(dir(kvpipe))
    assert [name for name in kvpipe.__all__ if f"`{name}" not in GUIDE] == []


def test_an_import_loads_python_alone_and_an_error_no_jax():
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True)
    new, are_errors, has_jax = json.loads(done.stdout)
    foreign = [name for name in new if name.partition(".")[0] not in sys.stdlib_module_names]
    assert foreign == ["kvpipe"]
    assert are_errors
    assert not has_jax


def test_a_name_that_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kvpipe' has no attribute 'atach'"):
        kvpipe.atach  # noqa: B018
