"""The worker's process without an engine: the real loop and the real protocol, but no jax.

Importing the engine takes most of the CPU time of a short run, and what the parent makes of its
worker has nothing to do with it. Only the sizes of the plan are missing.
"""

import sys
from importlib.machinery import PathFinder

from kvpipe.plan import fold
from kvpipe.records.run import Fit, RunPlanned
from kvpipe.worker import entry

ENGINE = ("jax", "jaxlib", "sgl_jax")


class NoEngine:
    """Finder that fails an import of the engine, so that no test runs half of one.

    Its files can still be found: the checks of the input read them.
    """

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name.partition(".")[0] in ENGINE else None
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is imported in the worker without an engine")

    def exec_module(self, module):
        raise AssertionError("there is no module")


def without_engine(config):
    """Import nothing; return what plans steps that hold nothing on a device."""
    return plan_nothing


def plan_nothing(planned, config, model_dir):
    ledgers = fold.plan_ledgers(planned, {}, devices=1)
    phases = fold.planned_phases(planned, ledgers)
    fit = Fit(True, 1 << 30, planned[0].step.step, config.engine.max_total_tokens)
    return fold.Plan(RunPlanned("cpu", 1, "none", phases, fit), ledgers, tuple(planned))


if __name__ == "__main__":
    sys.meta_path.insert(0, NoEngine())
    entry.main(without_engine)
