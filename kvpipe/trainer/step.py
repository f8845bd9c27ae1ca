"""The train step: gradients, then one optax AdamW update of the whole tree, all in place."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine.forward import Forward
from kvpipe.engine.training import compile_layers
from kvpipe.trainer.gradients import Gradients, compile_gradients
from kvpipe.trainer.layout import Layout, learning_rate, optimizer, steps_of
from kvpipe.trainer.scoring import Scorer


@dataclass(frozen=True)
class CompiledStep:
    """The compiled programs of a step, for the devices of a layout.

    ``gradients`` writes new gradients into the old ones' buffers; ``update`` maps parameters,
    gradients and moments to new ones in the same buffers, and to the numbers to report.
    ``reference`` scores a batch with the model's files in the place of the gradients, if the loss
    needs that.
    """

    gradients: Gradients
    update: jax.stages.Compiled
    reference: Scorer | None = None

    @property
    def temp_bytes(self) -> int:
        """Bytes on each device beside the sets; the programs run one at a time."""
        scoring = self.reference.temp_bytes if self.reference else 0
        return max(self.gradients.temp_bytes, self.used[-1].temp_size_in_bytes, scoring)

    @property
    def set_bytes(self) -> int:
        """Input bytes of the update on each device: all of parameters, gradients and moments."""
        return self.used[-1].argument_size_in_bytes

    @property
    def in_place_bytes(self) -> int:
        """Those of them whose memory the new sets take over (donated buffers)."""
        return self.used[-1].alias_size_in_bytes - self.gradients.copied_bytes

    @property
    def used(self) -> list[Any]:
        """XLA's memory analysis of each program, the update's last."""
        scoring = self.reference.used if self.reference else []
        return [*scoring, *self.gradients.used, self.update.memory_analysis()]


def compile_step(
    layout: Layout,
    config: TrainerConfig,
    forward: Forward | None,
    reference: Scorer | None = None,
) -> CompiledStep:
    """Return the step compiled for the devices of the layout.

    Args:
        layout: the trainer's shapes.
        config: its config.
        forward: the forward pass; None if nothing is learnt.
        reference: scores a batch with the reference of the loss; None if it has none.
    """
    gradients = compile_gradients(layout, config, forward)
    return CompiledStep(gradients, compile_update(layout, config), reference)


def compile_update(layout: Layout, config: TrainerConfig) -> jax.stages.Compiled:
    """Return the update of a layout's sets, compiled for its devices."""
    transformation, rate = optimizer(config), learning_rate(config)

    def update(params: Any, gradients: Any, moments: Any) -> Any:
        reported = {
            "gradient_norm": optax.tree.norm(optax.tree.cast(gradients, jnp.float32)),
            "learning_rate": jnp.float32(rate(steps_of(moments))),
        }
        # optax keeps the second moment in the parameters' dtype only if the gradients have that
        # dtype.
        updates, moments = transformation.update(
            optax.tree.cast_like(gradients, params), moments, params
        )
        return optax.apply_updates(params, updates), gradients, moments, reported

    held = (layout.params, layout.gradients, layout.moments)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    jitted = jax.jit(
        update,
        donate_argnums=(0, 1, 2),
        keep_unused=True,
        out_shardings=(*shardings, everywhere),
    )
    return compile_layers(jitted.lower(*held), layout.mesh)
