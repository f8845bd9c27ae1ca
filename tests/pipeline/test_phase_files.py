"""Whatever is wrong with a phase file, it is one message with file and line."""

import inspect
import pickle

import pytest

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline.description import describe
from kvpipe.pipeline.phase_files import phase_class, phase_names
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fold import check_order
from kvpipe.system import places
from tests.in_process import callable_in
from tests.refusal import refusal

HEAD = """\
from kvpipe.pipeline.phase import Effect, ParentPhase, Phase, Result, WorkerPhase


"""
RUN = """
    def run(self, ctx):
        return Result()
"""
WORKS = f"{HEAD}class Own(WorkerPhase):\n    effect = Effect()\n{RUN}"


def own(body, head=HEAD):
    """Return a phase file with a phase of this body, which begins in line 5."""
    return f"{head}class Own(WorkerPhase):\n{body}"


REFUSED = {
    "raises": (WORKS + 'raise ValueError("a\\nfault")\n', ", line 9: ValueError: a fault"),
    "raises in a function of its own": (
        WORKS + "def f():\n    return {}[3]\n\n\nf()\n",
        ", line 10: KeyError: 3",
    ),
    "syntax error": (WORKS + "x = = 3\n", ", line 9: SyntaxError: invalid syntax"),
    "indentation": (WORKS + "x = 3\n  y = 3\n", ", line 10: IndentationError: unexpected indent"),
    "missing import": (
        "import nosuch\n" + WORKS,
        ", line 1: ModuleNotFoundError: No module named 'nosuch'",
    ),
    "missing name of a module": (
        "from kvpipe.pipeline.facts import NOSUCH\n",
        ", line 1: ImportError: cannot import name 'NOSUCH' from 'kvpipe.pipeline.facts' "
        f"({places.PACKAGE}/pipeline/facts.py)",
    ),
    "sys.exit": (WORKS + "import sys\n\nsys.exit(4)\n", ", line 11: SystemExit: 4"),
    "null bytes": (
        WORKS + "\0",
        ": SyntaxError: source code string cannot contain null bytes",
    ),
    "empty": ("", ": no class extends WorkerPhase or ParentPhase"),
    "no phase": ("class Own:\n    pass\n", ": no class extends WorkerPhase or ParentPhase"),
    "two phases": (
        WORKS + "\n\nclass Second(Own):\n    pass\n",
        ", line 11: Second is a second phase; write one class in each file",
    ),
    "wrong base": (
        f"{HEAD}class Own(Phase):\n    effect = Effect()\n{RUN}",
        ", line 4: class Own: extend WorkerPhase or ParentPhase, not Phase",
    ),
    "no run": (
        own("    effect = Effect()\n"),
        ", line 4: class Own: it has no method run(self, ctx)",
    ),
    "run without the context": (
        own("    effect = Effect()\n\n    def run(self):\n        pass\n"),
        ", line 4: class Own: run must accept (self, ctx): too many positional arguments",
    ),
    "effect_given without the facts": (
        own(f"    def effect_given(self):\n        return Effect()\n{RUN}"),
        ", line 4: class Own: effect_given must accept (self, before): too many positional "
        "arguments",
    ),
    "an option that follows no key": (
        own(
            f"    effect = Effect()\n    many: int = follows('sampling.max_tokens')\n{RUN}",
            HEAD.replace("ParentPhase", "follows"),
        ),
        ", line 6: ValueError: there is no config key 'sampling.max_tokens'; did you mean "
        "'sampling.max_new_tokens' or 'sampling.stop_token_ids' or 'sampling.top_k'?",
    ),
    "no effect": (
        own(RUN),
        ", line 4: class Own: set effect = Effect(...), or override effect_given",
    ),
    "an effect of another type": (
        own(f"    effect = 'engine'\n{RUN}"),
        ", line 4: class Own: set effect = Effect(...), or override effect_given",
    ),
    "a tuple without its comma": (
        own(f"    effect = Effect(needs=('engine'))\n{RUN}"),
        ", line 5: TypeError: needs is 'engine', not a tuple; write ('engine',)",
    ),
    "a fact that there is not": (
        own(f"    effect = Effect(needs=('engin',))\n{RUN}"),
        ", line 5: ValueError: there is no fact 'engin'; did you mean 'engine'?",
    ),
    "on_failure of another type": (
        own(f"    effect = Effect()\n    on_failure = 'stop'\n{RUN}"),
        ", line 4: class Own: on_failure is 'stop', not a value of OnFailure",
    ),
    "an option of an unknown type": (
        own(f"    effect = Effect()\n    many: 'Nosuch' = 3\n{RUN}"),
        ", line 4: class Own: an option's type is unknown: name 'Nosuch' is not defined",
    ),
    "an option of a type that YAML has not": (
        own(f"    effect = Effect()\n    many: complex = 3j\n{RUN}"),
        ", line 4: class Own: option 'many' is of type <class 'complex'>; an option is a bool, int, "
        "float or str, a tuple[..., ...] of one of them, or one of these or None",
    ),
    "a default that can change": (
        own(f"    effect = Effect()\n    many: list = []\n{RUN}"),
        ", line 4: ValueError: mutable default <class 'list'> for field many is not allowed: use "
        "default_factory",
    ),
    "options in a wrong order": (
        own(f"    effect = Effect()\n    a: int = 3\n    b: int\n{RUN}"),
        ", line 4: TypeError: non-default argument 'b' follows default argument",
    ),
    "raises when it is made": (
        own(f"    effect = Effect()\n\n    def __post_init__(self):\n        None.x\n{RUN}"),
        ", line 8: AttributeError: 'NoneType' object has no attribute 'x'",
    ),
    "raises for its effect": (
        own(f"    def effect_given(self, before):\n        return 1 / 0\n{RUN}"),
        ", line 6: ZeroDivisionError: division by zero",
    ),
    "returns another effect": (
        own(f"    def effect_given(self, before):\n        return before\n{RUN}"),
        ", line 4: effect_given returned frozenset(), not an Effect",
    ),
}


@pytest.fixture
def phases(tmp_path, monkeypatch):
    """The directory of phases, for the length of a test."""
    folder = tmp_path / "phases"
    folder.mkdir()
    monkeypatch.setattr(places, "PHASES", folder)
    phase_class.cache_clear()
    yield folder
    phase_class.cache_clear()


def refused(use="it"):
    return refusal(lambda: check_order(build_steps(Kvpipe(pipeline=[use]))))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_phase_file_is_one_message_with_file_and_line(phases, name):
    source, message = REFUSED[name]
    (phases / "it.py").write_text(source)
    assert refused().removeprefix("pipeline step 'it': ") == f"phases/it.py{message}"


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(phases):
    (phases / "it.py").write_bytes(b"import os\nx = '\xff'\n")
    assert refused().startswith("pipeline step 'it': phases/it.py, line 2: SyntaxError: ")


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(phases):
    (phases / "folder.py").mkdir()
    (phases / "link.py").symlink_to("nosuch")
    (phases / "itself.py").symlink_to("itself.py")
    assert "phases/folder.py: IsADirectoryError: " in refused("folder")
    assert "phases/link.py: FileNotFoundError: " in refused("link")
    assert "phases/itself.py: OSError: [Errno 40] Too many levels" in refused("itself")


def test_a_wrong_file_is_refused_by_the_command_as_wrong_input(
    phases, tmp_path, monkeypatch, capfd
):
    (phases / "it.py").write_text("raise ValueError('a fault')\n")
    message = "phases/it.py, line 1: ValueError: a fault\n"
    with callable_in(tmp_path, monkeypatch, capfd) as kvpipe:
        done = kvpipe("check", "pipeline=cycles", "pipeline.0=it")
        described = kvpipe("phases")
    assert (done.code, done.out, done.err) == (2, "", f"kvpipe: pipeline step 'it': {message}")
    assert (described.code, described.out, described.err) == (2, "", f"kvpipe: {message}")


def test_a_wrong_file_that_no_step_uses_disturbs_no_run(phases):
    (phases / "it.py").write_text(WORKS)
    (phases / "other.py").write_text("raise ValueError\n")
    (step,) = build_steps(Kvpipe(pipeline=["it"]))
    assert (step.step, phase_names()) == ("it", ["it", "other"])


def test_a_file_is_read_again_once_it_is_mended(phases):
    (phases / "it.py").write_text("raise ValueError\n")
    with pytest.raises(InputError):
        phase_class("it")
    (phases / "it.py").write_text(WORKS)
    assert phase_class("it").__name__ == "Own"


def test_a_phase_can_be_pickled_inspected_and_described(phases):
    (phases / "it.py").write_text(f'"""A phase of the tests."""\n{WORKS}')
    (step,) = build_steps(Kvpipe(pipeline=["it"]))
    assert pickle.loads(pickle.dumps(step)) == step
    assert inspect.getsource(type(step)).startswith("class Own")
    assert describe("it", Kvpipe()).summary == "A phase of the tests."


def test_a_phase_is_the_file_of_kvpipe_whatever_else_has_its_name(tmp_path, monkeypatch):
    """A package ``phases`` or a module of a phase's name on the path is never executed."""
    for name in (
        "phases/__init__.py",
        "phases/generate.py",
        "generate.py",
        "kvpipe_phase_generate.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise AssertionError('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    phase_class.cache_clear()
    assert inspect.getfile(phase_class("generate")) == str(places.PHASES / "generate.py")
