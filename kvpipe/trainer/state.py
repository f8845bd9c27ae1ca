"""A live trainer: its arrays on the devices, one step of it, and its way to the host and back.

While its arrays are offloaded, their shapes take their places, as the engine's do.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from kvpipe.checkpoints import mapped
from kvpipe.config.schema import TrainerConfig
from kvpipe.engine import memory, transfer
from kvpipe.engine.forward import Forward
from kvpipe.engine.weight_map import HostArray
from kvpipe.errors import PhaseError
from kvpipe.pipeline.ledger import TRAINER_SETS, Change, Size
from kvpipe.trainer.batch import REFERENCE, Array, Batch
from kvpipe.trainer.layout import Layout, optimizer
from kvpipe.trainer.scoring import Scorer, compile_scorers
from kvpipe.trainer.step import CompiledStep, compile_step


@dataclass(frozen=True)
class StepReport:
    """Measurements of a training step: bytes over all devices, and fields for the phase's record.

    ``in_place_bytes`` are those of ``set_bytes``, as the compiler lays the sets out, that were
    updated in their own memory. ``temp_bytes`` are those of one device, activations among them.
    """

    set_bytes: int
    in_place_bytes: int
    temp_bytes: int
    peak_bytes: int
    fields: Mapping[str, Any]


class Trainer:
    """Parameters, gradients and AdamW's moments on the engine's devices, and the steps carried out.

    Parameters and gradients are by Hugging Face name, and the gradients are those of the last step,
    zeros before the first one. The moments are nested as in optax.
    """

    def __init__(
        self, layout: Layout, config: TrainerConfig, forward: Forward | None = None
    ) -> None:
        """Make a trainer that holds shapes only, until :meth:`start`.

        Without the forward pass of its model it learns nothing: its gradients are seeded.
        """
        self._layout = layout
        self._config = config
        self._forward = forward
        self._kept: dict[Size, list[transfer.HostShards]] = {}
        self.params: dict[str, Any] = dict(layout.params)
        self.gradients: dict[str, Any] = dict(layout.gradients)
        self.moments: Any = layout.moments
        self.steps = 0
        self.losses: list[float] = []

    @property
    def layout(self) -> Layout:
        """The shapes of its arrays, on their devices."""
        return self._layout

    @property
    def kept(self) -> Mapping[Size, Sequence[transfer.HostShards]]:
        """The arrays of each set that is offloaded; none while they are on the devices."""
        return self._kept

    @property
    def sets(self) -> dict[Size, list[jax.Array]]:
        """The arrays of each set that are on the devices."""
        trees = zip(TRAINER_SETS, (self.params, self.gradients, self.moments), strict=True)
        return {
            size: [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
            for size, tree in trees
        }

    def start(self, weights: Mapping[str, HostArray]) -> Change:
        """Place the parameters, cast to the trainer's dtype; gradients and moments are zeros.

        ``weights`` has at least the arrays of its parameters, by Hugging Face name.
        """
        init = self._init()
        transfer.allocator(self._gradients)
        before = memory.total_in_use()
        for name, like in self._layout.params.items():
            self.params[name] = transfer.begin(weights[name], like).wait()
            mapped.let_go(weights[name])
        self.gradients = self._zeros()
        self.moments = jax.block_until_ready(init(self.params))
        return self._completed(before)

    def resume(
        self,
        kept: Mapping[Size, Sequence[transfer.HostShards]],
        steps: int,
        losses: Sequence[float],
    ) -> Change:
        """Begin where an earlier trainer was when its offloaded sets, :attr:`kept`, were saved."""
        self._kept = {size: list(leaves) for size, leaves in kept.items()}
        self.steps, self.losses = steps, list(losses)
        return self.restore()

    def step(
        self, batch: Batch | None = None, reference: Mapping[str, HostArray] | None = None
    ) -> StepReport:
        """Carry out one step; the three sets take over their own memory.

        Args:
            batch: the samples or examples that it learns from; None if its gradients are seeded.
            reference: the weights, by Hugging Face name, that the loss compares with; None if it
                compares with none.

        Raises:
            PhaseError: the loss or the gradients are not finite.
        """
        compiled = self._compiled
        devices = self._layout.devices
        in_use = memory.total_in_use()
        began = time.monotonic()
        if batch is not None and reference is not None:
            batch = self._compared(batch, reference)
        self.gradients, numbers = compiled.gradients(self.params, self.gradients, self.steps, batch)
        *sets, reported = compiled.update(self.params, self.gradients, self.moments)
        self.params, self.gradients, self.moments = jax.block_until_ready(sets)
        compute_s = round(time.monotonic() - began, 6)
        self.steps += 1
        numbers |= {name: float(value) for name, value in reported.items()}
        _refuse_infinite(numbers, self.steps)
        if batch is not None:
            self.losses.append(numbers["loss"])
            numbers |= {"tokens": batch.learnt, "tokens_per_second": batch.learnt / compute_s}
        temp = compiled.temp_bytes * devices
        held = {"in_use_bytes": in_use, "temp_bytes": temp, "peak_bytes": in_use + temp}
        return StepReport(
            set_bytes=compiled.set_bytes * devices,
            in_place_bytes=compiled.in_place_bytes * devices,
            temp_bytes=compiled.temp_bytes,
            peak_bytes=in_use + temp,
            fields={
                "gradients": self._config.loss,
                "train_step": self.steps,
                "compute_s": compute_s,
                "step_memory": held,
                **numbers,
            },
        )

    def logprobs(self, batch: Batch) -> Array:
        """Return the log-probability of each token of a batch from the second one on."""
        return self._scorers[0](self.params, batch)

    def _compared(self, batch: Batch, reference: Mapping[str, HostArray]) -> Batch:
        """Return a batch with the log-probabilities of the reference.

        Its weights replace the last gradients, which are no longer needed, leaf by leaf. So it
        takes no memory of its own.
        """
        scorer = self._compiled.reference
        assert scorer is not None, "the loss has a reference"
        for name, like in self._layout.gradients.items():
            self.gradients[name].delete()
            self.gradients[name] = transfer.begin(reference[name], like).wait()
            mapped.let_go(reference[name])
        logprobs = scorer(self.gradients, batch)
        return replace(batch, arrays={**batch.arrays, REFERENCE: logprobs})

    def offload(self) -> Change:
        """Copy parameters and moments to the host, leaf by leaf, and free the devices.

        The gradients are freed only: each step makes them anew.
        """
        before = memory.total_in_use()
        for size in (Size.TRAINER_PARAMS, Size.TRAINER_MOMENTS):
            self._kept[size] = []
            for leaf in self.sets[size]:
                self._kept[size].append(transfer.to_host(leaf))
                leaf.delete()
        return self._freed(before)

    def restore(self) -> Change:
        """Bring the offloaded arrays back to the devices, leaf by leaf; the gradients are zeros."""
        transfer.allocator(self._gradients)  # it may have been evicted
        before = memory.total_in_use()
        self.params = self._brought(Size.TRAINER_PARAMS, self._layout.params)
        self.gradients = self._zeros()
        self.moments = self._brought(Size.TRAINER_MOMENTS, self._layout.moments)
        return self._completed(before)

    def drop(self) -> Change:
        """Free all that it holds, on the devices and on the host."""
        before = memory.total_in_use()
        held = sum(memory.counted(arrays) for arrays in self.sets.values())
        self._kept = {}
        return replace(self._freed(before), nbytes=held)

    def _init(self) -> jax.stages.Compiled:
        """Return the program that makes the moments; its code takes memory from here on."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._layout.moments)
        init = jax.jit(optimizer(self._config).init, out_shardings=shardings)
        return init.lower(self._layout.params).compile()

    @property
    def _gradients(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(self._layout.gradients.values())

    @cached_property
    def _compiled(self) -> CompiledStep:
        reference = self._scorers[1] if self._config.has_reference else None
        return compile_step(self._layout, self._config, self._forward, reference)

    @cached_property
    def _scorers(self) -> tuple[Scorer, Scorer | None]:
        assert self._forward is not None, "only a trainer that learns has a forward pass"
        return compile_scorers(self._layout, self._config, self._forward)

    def _zeros(self) -> dict[str, jax.Array]:
        return dict(zip(self._layout.gradients, transfer.zeros(self._gradients), strict=True))

    def _brought(self, size: Size, shapes: Any) -> Any:
        """Return the kept leaves of a set on the devices; the host lets go of each."""
        kept = self._kept.pop(size)
        leaves, structure = jax.tree.flatten(shapes)
        placed = []
        for like in leaves:
            placed.append(transfer.begin(kept.pop(0), like).wait())
        return jax.tree.unflatten(structure, placed)

    def _freed(self, before: int) -> Change:
        for leaf in [leaf for arrays in self.sets.values() for leaf in arrays]:
            if not leaf.is_deleted():
                leaf.delete()
        self.params = dict(self._layout.params)
        self.gradients = dict(self._layout.gradients)
        self.moments = self._layout.moments
        return self._completed(before)

    def _completed(self, before: int) -> Change:
        """Give freed host memory back to the system; return the change of all three sets."""
        kept = (leaf for leaves in self._kept.values() for leaf in leaves)
        host_bytes = transfer.host_bytes(kept)
        leaves = self._layout.leaves
        changed_bytes = memory.total_in_use() - before
        memory.give_back_host_memory()
        fields = {
            "num_arrays": len(leaves),
            "set_bytes": sum(memory.bytes_of(leaves)),
            "changed_bytes": changed_bytes,
            "host_bytes": host_bytes,
        }
        return Change(memory.counted(leaves), changed_bytes, fields=fields)


def _refuse_infinite(numbers: Mapping[str, float], step: int) -> None:
    if wrong := {name: value for name, value in numbers.items() if not math.isfinite(value)}:
        found = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        raise PhaseError(
            f"training step {step}: {found}; a smaller trainer.learning_rate or a trainer.clip_norm "
            "may keep them finite"
        )
