"""The parent process has no jax, whatever it imports, and no modules import each other in a circle.

import-linter sees static imports only, and none under ``TYPE_CHECKING``.
"""

import json
import pkgutil
import re
import subprocess
import sys
import tomllib

import grimp

import kvpipe
import phases
from tests.helpers_config import ROOT

HEAVY = {"flax", "jax", "jaxlib", "optax", "sgl_jax", "torch", "transformers", "wandb"}
# What a child process, or a process with an engine of its own, imports beside the engine's room. The
# worker's own modules import jax only once the parent can be listened to.
WORKER_ONLY = {
    "kvpipe.api.attached",
    "kvpipe.api.recording",
    "kvpipe.worker.doctor_probe",
    "kvpipe.worker.planner",
}

IMPORT_EACH = """
import importlib, json, sys
heavy, found = set(sys.argv[1].split(",")), {}
for name in sys.argv[2:]:
    before = set(sys.modules)
    importlib.import_module(name)
    found[name] = sorted((set(sys.modules) - before) & heavy)
print(json.dumps(found))
"""

RUN_CLI = """
import json, sys
from kvpipe.cli import app
try:
    code = app.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def modules():
    """Every module of kvpipe and phases but those of engine and trainer."""
    return {
        module.name
        for package in (kvpipe, phases)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.startswith(("kvpipe.engine", "kvpipe.trainer"))
    }


def python(code, *arguments, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_module_of_the_parent_and_every_phase_leaves_jax_and_wandb_out():
    parents = modules() - WORKER_ONLY - {"kvpipe.__main__"}
    assert {"kvpipe.cli.app", "kvpipe.parent.supervisor", "kvpipe.sinks.wandb"} <= parents
    assert {"kvpipe.checkpoints.tiny", "phases.generate"} <= parents
    found = json.loads(python(IMPORT_EACH, ",".join(HEAVY), *sorted(parents)).stdout)
    assert found == {name: [] for name in parents}


def test_the_modules_of_the_worker_that_are_left_out_above_exist():
    assert modules() >= WORKER_ONLY


def test_help_and_cfg_and_check_import_neither_jax_nor_numpy_nor_what_draws(tmp_path):
    for arguments in (["--help"], ["--cfg", "job"], ["check"]):
        done = python(RUN_CLI, "kvpipe", *arguments, cwd=tmp_path)
        code, imported = json.loads(done.stderr)
        assert code in (0, None), arguments
        drawing = {"PIL", "jinja2", "ml_dtypes", "numpy"}
        assert (HEAVY | drawing) & set(imported) == set(), arguments


def test_the_map_of_the_rooms_names_each_folder_in_the_order_of_the_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"^kvpipe/\n((?:  .*\n)+)", text, re.MULTILINE)
    rooms = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in contract["contracts"] if c["type"] == "layers")
    assert rooms == [room for layer in layers for room in layer.split(" | ")]
    assert sorted(rooms) == [m.name for m in pkgutil.iter_modules(kvpipe.__path__) if m.ispkg]


def circle(graph):
    """Return the modules of the shortest circle of imports, each importing the next; or nothing."""
    circles = [
        (module, *graph.find_shortest_chain(imported, module))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if graph.chain_exists(imported, module)
    ]
    return min(circles, key=lambda names: (len(names), names), default=())


def test_no_modules_import_each_other_in_a_circle_not_even_for_their_types():
    executed, every = (
        grimp.build_graph(
            "kvpipe", "phases", exclude_type_checking_imports=excluded, cache_dir=None
        )
        for excluded in (True, False)
    )
    assert every.count_imports() > executed.count_imports()
    assert " imports ".join(circle(every)) == ""


def test_of_several_circles_the_shortest_is_named():
    graph = grimp.ImportGraph()
    for importer, imported in ("ab", "bc", "cd", "da", "eb", "ca"):
        graph.add_import(importer=importer, imported=imported)
    assert circle(graph) == ("a", "b", "c", "a")
