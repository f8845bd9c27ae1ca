"""Whatever is wrong with a phase file, it is one message with file and line."""

import hashlib
import inspect
import pickle
import sys

import pytest

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline.description import describe
from kvpipe.pipeline.phase_files import _class_at, phase_class, phase_names
from kvpipe.pipeline.steps import build_steps, origins
from kvpipe.plan.fold import check_order
from kvpipe.system import places, plugins
from tests.in_process import callable_in
from tests.installed_package import install
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
    return folder


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A directory ``mine`` of the user's, below the working directory."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages, for the length of a test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    plugins.installed.cache_clear()
    known = {*sys.modules}
    yield folder
    plugins.installed.cache_clear()
    for name in {*sys.modules} - known:
        if name.partition(".")[0] in ("acme", "other"):
            del sys.modules[name]


def refused(use="it", **config):
    return refusal(lambda: check_order(build_steps(Kvpipe(pipeline=[use], **config))))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_phase_file_is_one_message_with_file_and_line(phases, name):
    source, message = REFUSED[name]
    (phases / "it.py").write_text(source)
    assert refused().removeprefix("pipeline step 'it': ") == f"phases/it.py{message}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_phase_file_of_ones_own_is_one_message_with_file_and_line(mine, name):
    source, message = REFUSED[name]
    (mine / "it.py").write_text(source)
    reported = refused(phase_path=["mine"]).removeprefix("pipeline step 'it': ")
    assert reported == f"mine/it.py{message}"


# What is wrong → the package's files, the entry point, and what is said after its name.
PACKAGES = {
    "its module raises": (
        {"acme/__init__.py": "", "acme/it.py": f"{WORKS}1 / 0\n"},
        "acme.it:Own",
        ", {site}/acme/it.py, line 9: ZeroDivisionError: division by zero",
    ),
    "the package raises": (
        {"acme/__init__.py": "x = 1\n{}['x']\n", "acme/it.py": WORKS},
        "acme.it:Own",
        ", {site}/acme/__init__.py, line 2: KeyError: 'x'",
    ),
    "another module of it raises": (
        {"acme/__init__.py": "", "acme/it.py": "import acme.on\n", "acme/on.py": "\nint('x')\n"},
        "acme.it:Own",
        ", {site}/acme/on.py, line 2: ValueError: invalid literal for int() with base 10: 'x'",
    ),
    "syntax error": (
        {"acme.py": "x = = 3\n"},
        "acme:Own",
        ", line 1: SyntaxError: invalid syntax",
    ),
    "missing import": (
        {"acme.py": "import nosuch\n"},
        "acme:Own",
        ", line 1: ModuleNotFoundError: No module named 'nosuch'",
    ),
    "sys.exit": (
        {"acme.py": "import sys\nsys.exit(0)\n"},
        "acme:Own",
        ", line 2: SystemExit: 0",
    ),
    "no such module": ({}, "acme.it:Own", ": ModuleNotFoundError: No module named 'acme'"),
    "no such class": (
        {"acme.py": WORKS},
        "acme:Owm",
        ": AttributeError: module 'acme' has no attribute 'Owm'",
    ),
    "a module": (
        {"acme.py": WORKS},
        "acme",
        ": it is not a class; write it = 'PACKAGE.MODULE:CLASS'",
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wrong_phase_of_a_package_is_one_message_with_file_and_line(site, name):
    files, point, message = PACKAGES[name]
    install(site, "acme-phases", files, phases={"it": point})
    reported = refused().removeprefix(
        f"pipeline step 'it': kvpipe.phases: acme-phases 2.1, {point}"
    )
    assert reported == message.replace("{site}", str(site))


def test_a_class_of_a_package_that_is_no_phase_is_refused(site):
    sources = {"acme.py": own("    effect = Effect()\n") + "\n\nclass Other:\n    pass\n"}
    install(site, "acme-phases", sources, phases={"it": "acme:Own", "other": "acme:Other"})
    assert refused() == (
        f"pipeline step 'it': {site}/acme.py, line 4: class Own: it has no method run(self, ctx)"
    )
    assert refused("other").endswith("Other does not extend WorkerPhase or ParentPhase")


def test_what_a_phase_inherits_from_another_file_is_blamed_on_the_phase(site):
    base = own(f"    def effect_given(self, before):\n        return 1 / 0\n{RUN}")
    derived = "from other import Own\n\n\nclass Derived(Own):\n    pass\n"
    files = {"acme.py": derived, "other.py": base}
    install(site, "acme-phases", files, phases={"it": "acme:Derived"})
    assert refused() == f"{site}/acme.py: ZeroDivisionError: division by zero"


def test_two_packages_with_a_phase_of_one_name_are_refused(site):
    install(site, "acme", {"acme.py": WORKS}, phases={"it": "acme:Own"})
    install(site, "other", {"other.py": WORKS}, phases={"it": "other:Own"})
    message = refused()
    assert "other 2.1, other:Own" in message
    assert "acme 2.1, acme:Own" in message
    assert message.endswith("have the name 'it'; keep one")


REPLACES = WORKS.replace("effect = Effect()", "effect = Effect()\n    replaces = True")


def test_a_phase_that_has_the_name_of_another_one_is_refused_unless_it_says_so(mine, site):
    """A file of one's own over a package's, and a package's over kvpipe's."""
    for name in ("generate.py", "it.py"):
        (mine / name).write_text(WORKS)
    points = {"it": "acme:Own", "release": "acme:Own"}
    install(site, "acme-phases", {"acme.py": WORKS}, phases=points)
    ways = "choose another name, or write 'replaces = True' into class Own if it takes the place"
    assert f"mine/generate.py: phases/generate.py has the name 'generate' too; {ways}" in refused(
        "generate", phase_path=["mine"]
    )
    assert "mine/it.py: acme-phases 2.1, acme:Own has the name" in refused(phase_path=["mine"])
    assert "acme:Own: phases/release.py has the name 'release' too" in refused("release")
    (mine / "generate.py").write_text(REPLACES)
    (step,) = build_steps(Kvpipe(pipeline=["generate"], phase_path=["mine"]))
    assert inspect.getfile(type(step)) == str(mine / "generate.py")


def test_of_two_directories_each_phase_says_where_it_comes_from(mine, site):
    (mine.parent / "more").mkdir()
    for folder, name in ((mine, "it"), (mine.parent / "more", "also")):
        (folder / f"{name}.py").write_text(f"# {name}\n{WORKS}")
    packed = WORKS.replace("    effect", '    """A phase of acme."""\n\n    effect')
    install(site, "acme-phases", {"acme.py": packed}, phases={"packed": "acme:Own"})
    path = [str(mine), "more", "mine"]
    pipeline = ["also", "it", "jax_ready", "packed"]
    config = Kvpipe(pipeline=pipeline, phase_path=path)
    assert len({type(step) for step in build_steps(config)}) == 4
    digests = {
        name: hashlib.sha256(text.encode()).hexdigest()[:12]
        for name, text in (("it", f"# it\n{WORKS}"), ("also", f"# also\n{WORKS}"), ("", packed))
    }
    assert {use: str(origin) for use, origin in origins(config).items()} == {
        "it": f"{mine}/it.py (sha256 {digests['it']})",
        "also": f"{mine.parent}/more/also.py (sha256 {digests['also']})",
        "packed": f"acme-phases 2.1, acme:Own (sha256 {digests['']})",
    }
    described = describe("packed", config)
    assert (described.origin, described.summary) == (
        str(origins(config)["packed"]),
        "A phase of acme.",
    )
    assert describe("jax_ready", config).origin == ""
    assert {*pipeline} <= {*phase_names(path)}


def test_a_phase_path_that_is_kvpipes_own_directory_changes_nothing():
    config = Kvpipe(pipeline=["jax_ready"], phase_path=[str(places.PHASES)])
    assert [type(step).__name__ for step in build_steps(config)] == ["JaxReady"]
    assert origins(config) == {}


def test_files_that_are_no_phases_are_no_names(mine):
    for name in ("_helper.py", ".it.py", "notes.txt", "it.py"):
        (mine / name).write_text(WORKS)
    assert {*phase_names(["mine"])} - {*phase_names()} == {"it"}
    for name in ("_helper", ".it", "../mine/it", str(mine / "it")):
        assert refused(name, phase_path=["mine"]).startswith(
            f"pipeline step {name!r}: there is no phase {name!r}; "
        )


def test_a_directory_that_there_is_not_is_refused(mine):
    (mine / "it.py").write_text(WORKS)
    for wrong in ("nosuch", "mine/it.py"):
        message = refused(phase_path=["mine", wrong])
        assert message == f"phase_path: there is no directory {wrong}"


def test_what_a_phase_file_prints_does_not_get_into_the_output(mine, capsys):
    (mine / "it.py").write_text(f"print('loaded')\n{WORKS}")
    build_steps(Kvpipe(pipeline=["it"], phase_path=["mine"]))
    assert capsys.readouterr() == ("", "loaded\n")


def test_a_file_that_is_edited_between_two_jobs_of_a_sweep_is_read_again(mine):
    config = Kvpipe(pipeline=["it"], phase_path=["mine"])
    (mine / "it.py").write_text(WORKS)
    before = origins(config)["it"]
    (mine / "it.py").write_text(f"{WORKS}EDITED = True\n")
    (step,) = build_steps(config)
    assert sys.modules[type(step).__module__].EDITED
    assert origins(config)["it"].sha256 != before.sha256


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
    _class_at.cache_clear()
    assert inspect.getfile(phase_class("generate")) == str(places.PHASES / "generate.py")
