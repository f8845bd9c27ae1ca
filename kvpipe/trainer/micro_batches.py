"""A program that runs over the micro-batches of a batch, one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine import memory, transfer
from kvpipe.trainer.batch import Batch
from kvpipe.trainer.layout import Shapes


@dataclass(frozen=True)
class MicroBatched:
    """Base of the programs that take a micro-batch beside sets of the trainer.

    Attributes:
        program: compiled for the devices of its inputs.
        inputs: the arrays of a micro-batch that it takes, as shapes by name.
        config: the trainer's config.
    """

    program: jax.stages.Compiled
    inputs: Shapes
    config: TrainerConfig

    @property
    def used(self) -> list[Any]:
        """XLA's memory analysis of the program."""
        return [self.program.memory_analysis()]

    @property
    def temp_bytes(self) -> int:
        """Bytes on a device beside the trainer's sets: temporaries and a micro-batch."""
        inputs: list[Any] = list(self.inputs.values())
        return self.used[0].temp_size_in_bytes + sum(map(memory.shard_bytes, inputs))

    def placed(self, batch: Batch) -> Iterator[dict[str, jax.Array]]:
        """Place the inputs of each micro-batch on the devices, in turn."""
        for part in batch.parts(self.config.rows):
            yield {
                name: transfer.begin(part[name], like).wait() for name, like in self.inputs.items()
            }
