"""Start an engine without weights: its model has shapes until others are streamed or swapped in.

No random weights are made only to be thrown away, and the devices never hold a second set. The shapes
have the shardings that the engine would give its own weights, so its steps compile to the same
programs.
"""

from pathlib import Path

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import compat, peaks, sglang, shapes
from kvpipe.engine.params import ParamTable
from kvpipe.engine.weights import WEIGHTS

_EMPTY = "it has no weights yet; stream or swap some in first"


def start(config: EngineConfig, model_dir: Path, idle_timeout_s: float) -> sglang.SglangEngine:
    """Start the engine as :func:`kvpipe.engine.sglang.start` does, but refuse to generate.

    Raises:
        InputError: tp × dp is not the device count.
        EngineError: it did not start, or cut the KV cache's capacity down.
    """
    compat.import_engine()
    from sgl_jax.srt.model_executor import model_runner

    with compat.replaced(model_runner, "get_model_loader", shapes.AbstractLoader):
        engine = sglang.start(config, model_dir, idle_timeout_s)
    engine.unavailable[WEIGHTS] = _EMPTY
    peaks.mark()
    table = ParamTable(engine)
    # HEAD has put empty arrays in the places of the shapes.
    table.put_in_step(shapes.params_of(engine.runner.model, engine.runner.mesh))
    table.update_model()
    return engine
