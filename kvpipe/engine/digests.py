"""Digests that prove which weights an engine computes with, position by position.

The digest of a parameter is two sums modulo 2³² over its elements: the bits of each times a
multiplier of its row and one of its column. Integer sums that wrap are exact and associative, so
neither XLA's order of reduction nor the sharding matters. Any changed element is found, and any
exchange of two different values within a row or a column of up to 65,536 elements (16-bit dtypes);
any other exchange with a probability of 1 - 2⁻³² or more.

On the devices a parameter is summed where it lies, with the multipliers of the *engine's* positions.
Its source is summed by :class:`SourceSum` on the host, or where the trainer has it, with those
multipliers brought to the *checkpoint's* positions by the rule in :class:`Axis`. Nothing here may
use the mover's own rules (:class:`~kvpipe.engine.weight_map.EngineView`, ``training._mover``) or
the map's (``transpose`` and ``heads`` of a Leaf): a fault there would cancel out.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from kvpipe.engine import multihost
from kvpipe.errors import EngineError
from kvpipe.plan.targets import CPU
from kvpipe.records.run import Check

Words = NDArray[np.uint32]
Digest = tuple[int, int]

_MODULUS = 1 << 32
# Odd, so that both halves of a 32-bit element count: a difference in the sign alone times any
# difference of two odd multipliers would be 0.
_UPPER_HALF = 0x9E3779B1
# The low bits of multipliers differ along an axis, whatever the hash above them gives.
_DISTINCT_BITS = 17
# As many values XLA's CPU compiler sums together with what makes them; of more it makes an array.
_FEW = 32
_NOTHING = np.uint32(0)
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter: its length in the checkpoint and in the engine.

    Attributes:
        source, engine: its lengths.
        head_dim, engine_head_dim: of a head, where the axis counts heads and the lengths differ:
            the engine repeats KV heads, each as often as all others, and pads each head at its end.
    """

    source: int
    engine: int
    head_dim: int = 1
    engine_head_dim: int = 1

    @property
    def origin(self) -> NDArray[np.int64]:
        """The checkpoint's position of each of the engine's; -1 for padding."""
        positions = np.arange(self.engine)
        if self.source == self.engine:
            return positions
        head, within = np.divmod(positions, self.engine_head_dim)
        heads = self.source // self.head_dim
        repeats = (self.engine // self.engine_head_dim) // heads
        origin = head // repeats * self.head_dim + within
        return np.where(within < self.head_dim, origin, -1)


@dataclass(frozen=True)
class Rule:
    """Source of the elements of a parameter.

    Attributes:
        source: its Hugging Face name.
        transposed: whether the engine has it as [in, out], the checkpoint as [out, in].
        rows, columns: its axes in the checkpoint's order; a vector has one column.
    """

    source: str
    transposed: bool
    rows: Axis
    columns: Axis

    @property
    def is_widened(self) -> bool:
        """Whether the engine has more elements than the checkpoint."""
        return any(axis.source != axis.engine for axis in (self.rows, self.columns))


@dataclass(frozen=True)
class Proof:
    """The digests of the weights that an engine has, held against those of their source.

    Attributes:
        leaves: digest of each parameter on the devices, by path; empty without digests.
        whole: digest of the set as the checkpoint has it: the same for any number of devices.
        proven: whether there was a source to hold them against.
        wrong: paths of the parameters that differ from their source.
    """

    leaves: Mapping[str, Digest] = field(default_factory=dict)
    whole: str | None = None
    proven: bool = False
    wrong: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, str]:
        """The digest of the set, for records."""
        return {} if self.whole is None else {"weights_digest": self.whole}

    @property
    def checks(self) -> tuple[Check, ...]:
        """The check that every parameter is its source's."""
        if not self.proven:
            return ()
        right = len(self.leaves) - len(self.wrong)
        detail = f"differ from their source: {', '.join(self.wrong)}" if self.wrong else ""
        return (Check("weights_proven", len(self.leaves), right, not self.wrong, detail),)


@dataclass(frozen=True)
class Heads:
    """The sizes of a model that say how the engine widens its attention.

    Attributes:
        query, kv: heads in the checkpoint.
        dim, engine_dim: elements of a head in the checkpoint and in the engine.
    """

    query: int
    kv: int
    dim: int
    engine_dim: int

    def axis(self, heads: int, engine: int) -> Axis:
        """Return the axis of ``heads`` heads that is ``engine`` long in the engine."""
        return Axis(heads * self.dim, engine, self.dim, self.engine_dim)


def rule_of(source: str, shape: tuple[int, ...], heads: Heads) -> Rule:
    """Return the source of the elements of a parameter, from its name and shape alone.

    Args:
        source: its Hugging Face name.
        shape: its shape in the engine.
        heads: the heads of the model.
    """
    module = source.split(".")[-2]
    transposed = len(shape) == 2 and module not in _EMBEDDINGS
    engine_rows, engine_columns = reversed(shape) if transposed else (*shape, 1)[:2]
    rows, columns = Axis(engine_rows, engine_rows), Axis(engine_columns, engine_columns)
    if module == "q_proj":
        rows = heads.axis(heads.query, engine_rows)
    elif module in ("k_proj", "v_proj"):
        rows = heads.axis(heads.kv, engine_rows)
    elif module in ("q_norm", "k_norm"):
        rows = heads.axis(1, engine_rows)
    elif module == "o_proj" and len(shape) == 2:
        columns = heads.axis(heads.query, engine_columns)
    return Rule(source, transposed, rows, columns)


class SourceSum:
    """The digest that a parameter has if it is exactly a weight on the host.

    Give it the weight block by block; :attr:`digest` is that of the engine's parameter. Both sums
    share the multipliers of the columns, so one pass gives the sum of each row, whatever the order of
    the weight in memory.
    """

    def __init__(self, rule: Rule, weight: NDArray[Any], dtype: Any) -> None:
        """Prepare for the blocks of ``weight``, cast to ``dtype``, in memory order."""
        self._rows, self._columns = _at_source(rule)
        self._row_sums = np.zeros(self._rows.shape[1], np.uint32)
        # A block has whole lines: rows of the checkpoint, or columns if those are contiguous.
        self._by_rows = weight.ndim == 1 or abs(weight.strides[0]) >= abs(weight.strides[1])
        self._length = len(self._columns if self._by_rows else self._row_sums)
        self._dtype = np.dtype(dtype)
        self._at = 0
        self._products = np.empty((0, self._length), np.uint32)

    def block_bytes(self, nbytes: int, itemsize: int) -> int:
        """Return about ``nbytes`` that are whole lines."""
        line = self._length * itemsize
        return max(1, nbytes // line) * line

    def add(self, block: NDArray[Any]) -> None:
        """Add the next whole lines of the weight, as one-dimensional values."""
        words = _words(block.astype(self._dtype, copy=False))
        lines = words.reshape(-1, self._length)
        at = slice(self._at, self._at + len(lines))
        self._at = at.stop
        if len(self._products) < len(lines):
            self._products = np.empty(lines.shape, np.uint32)
        product = self._products[: len(lines)]
        np.copyto(product, lines)  # numpy's product of two widths takes longer
        if self._by_rows:
            product *= self._columns
            self._row_sums[at] = np.add.reduce(product, axis=1, dtype=np.uint32)
        else:
            product *= self._columns[at, None]
            self._row_sums += np.add.reduce(product, axis=0, dtype=np.uint32)

    @property
    def digest(self) -> Digest:
        """The digest, once all blocks are added."""
        first, second = np.add.reduce(self._row_sums * self._rows, axis=1, dtype=np.uint32).tolist()
        return first, second


def of_engine(rules: Mapping[str, Rule], params: Mapping[str, Any]) -> dict[str, Digest]:
    """Return the digest of each parameter on the devices, by path.

    Every host must call it at the same point.

    Raises:
        KeyError: a parameter is not on the devices.
    """
    return _on_devices(
        {
            path: (params[path], _at_engine(rule), int(not rule.transposed))
            for path, rule in rules.items()
        }
    )


def of_trainer(
    rules: Mapping[str, Rule], trained: Mapping[str, jax.Array], dtypes: Mapping[str, Any]
) -> dict[str, Digest]:
    """Return the digest that each parameter has if it is exactly the trained one, by path.

    Args:
        rules: where the elements come from, by path.
        trained: arrays on the devices, by Hugging Face name, in its layout.
        dtypes: dtype of each parameter in the engine, by path.
    """
    return _on_devices(
        {path: (trained[rule.source], _at_source(rule), 1) for path, rule in rules.items()},
        dtypes,
    )


def of_set(
    rules: Mapping[str, Rule], params: Mapping[str, Any], leaves: Mapping[str, Digest]
) -> str:
    """Return the digest of a whole set as the checkpoint has it.

    It combines, by name, the sums over the checkpoint's positions: a repeated KV head counts once.

    Args:
        rules: where the elements come from, by path.
        params: the parameters on the devices, by path.
        leaves: their digests.
    """
    widened = {path: rule for path, rule in rules.items() if rule.is_widened}
    once = _on_devices(
        {
            path: (params[path], _once(rule), int(not rule.transposed))
            for path, rule in widened.items()
        }
    )
    digests = {rules[path].source: digest for path, digest in {**leaves, **once}.items()}
    lines = (f"{name} {a:08x}{b:08x}\n" for name, (a, b) in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def lowered(rules: Mapping[str, Rule], params: Mapping[str, Any]) -> list[jax.stages.Lowered]:
    """Return the programs of :func:`of_engine`, one for each kind of parameter, to be compiled.

    Args:
        rules: where the elements come from, by path.
        params: shape, dtype and sharding of each parameter, by path.
    """
    kinds: dict[Any, jax.stages.Lowered] = {}
    for path, rule in rules.items():
        param, axis = params[path], int(not rule.transposed)
        kind = (param.shape, param.dtype, param.sharding, axis)
        if kind not in kinds:
            program, shardings = _program(param.sharding, param.ndim, axis, np.dtype(param.dtype))
            multipliers = (
                jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=where)
                for values, where in zip(_at_engine(rule), shardings, strict=True)
            )
            kinds[kind] = program.lower(param, *multipliers, _NOTHING)
    return list(kinds.values())


Multipliers = tuple[Words, Words]
"""Of the rows, [2, rows], one line for each of the two sums; of the columns, [columns]."""


def _at_engine(rule: Rule) -> Multipliers:
    """Return the multipliers of the engine's positions, in the checkpoint's order of axes."""
    return _rows(rule.rows.engine), _columns(rule.columns.engine)


def _at_source(rule: Rule) -> Multipliers:
    """Return the multipliers of the checkpoint's positions: the sum of those that it goes to."""
    return _gathered(_rows, rule.rows), _gathered(_columns, rule.columns)


@lru_cache(maxsize=64)
def _gathered(multipliers_of: Callable[[int], Words], axis: Axis) -> Words:
    """Sum the multipliers that belong to each position of the checkpoint."""
    multipliers = multipliers_of(axis.engine)
    if axis.source == axis.engine:
        return multipliers
    gathered = np.zeros((*multipliers.shape[:-1], axis.source), np.uint32)
    origin = axis.origin
    held = origin >= 0
    np.add.at(gathered.T, origin[held], multipliers.T[held])
    return gathered


def _once(rule: Rule) -> Multipliers:
    """Return the checkpoint's multipliers, each at the first place of its element in the engine."""
    return _spread(_rows, rule.rows), _spread(_columns, rule.columns)


@lru_cache(maxsize=64)
def _spread(multipliers_of: Callable[[int], Words], axis: Axis) -> Words:
    multipliers = multipliers_of(axis.source)
    if axis.source == axis.engine:
        return multipliers
    spread = np.zeros((*multipliers.shape[:-1], axis.engine), np.uint32)
    origins, first = np.unique(axis.origin, return_index=True)
    held = origins >= 0
    spread[..., first[held]] = multipliers[..., origins[held]]
    return spread


@lru_cache(maxsize=64)
def _rows(length: int) -> Words:
    return np.stack([_hashed(length, 1), _hashed(length, 22697)])


@lru_cache(maxsize=64)
def _columns(length: int) -> Words:
    return np.ones(1, np.uint32) if length == 1 else _hashed(length, 40503)


def _hashed(length: int, stride: int) -> Words:
    """Return odd uint32 multipliers: hashes in the high bits, distinct odd numbers in the low bits.

    Args:
        length: number of multipliers.
        stride: an odd number, different for each axis and sum, so that a transposed matrix differs.
    """
    index = np.arange(length, dtype=np.uint32)
    mixed = (index + np.uint32(stride)) * np.uint32(0x9E3779B1)
    for factor in (0x85EBCA77, 0xC2B2AE3D):
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(factor)
    low = np.uint32((1 << _DISTINCT_BITS) - 1)
    return ((mixed ^ (mixed >> np.uint32(16))) & ~low) | ((2 * index * np.uint32(stride) + 1) & low)


def _words(values: NDArray[Any]) -> NDArray[Any]:
    """Return the bits of each value as one unsigned integer below 2³²."""
    bits = values.view(f"u{values.itemsize}")
    if bits.itemsize == 2:
        return bits
    return (bits & np.uint32(0xFFFF)) + (bits >> np.uint32(16)) * np.uint32(_UPPER_HALF)


def _on_devices(
    arrays: Mapping[str, tuple[jax.Array, Multipliers, int]],
    dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Digest]:
    """Return the sums of arrays, each with its multipliers and the axis of its columns.

    Each device sums its own shards, and the hosts add them up: no device waits for another one.
    """
    placed: dict[Any, list[jax.Array]] = {}
    sums: dict[str, jax.Array] = {}
    for path, (array, multipliers, axis) in arrays.items():
        dtype = np.dtype(dtypes[path] if dtypes else array.dtype)
        program, shardings = _program(array.sharding, array.ndim, axis, dtype)
        kind = (shardings, *map(id, multipliers))
        if kind not in placed:
            placed[kind] = [
                # Unlike device_put, it makes no comparison between hosts.
                jax.make_array_from_callback(values.shape, where, values.__getitem__)
                for values, where in zip(multipliers, shardings, strict=True)
            ]
        sums[path] = program(array, *placed[kind], _NOTHING)
    mine = {path: _of_devices(sums[path]) for path in sums}
    hosts = multihost.each(mine)
    return {
        path: _whole(path, arrays[path][0], {k: v for host in hosts for k, v in host[path].items()})
        for path in mine
    }


@lru_cache(maxsize=256)
def _program(
    sharding: NamedSharding, ndim: int, axis: int, dtype: np.dtype[Any]
) -> tuple[Any, tuple[NamedSharding, NamedSharding]]:
    """Return the program that sums each shard of an array, and the shardings of its multipliers."""
    mesh: Any = sharding.mesh
    dims = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    rows, columns = (dims[0], None) if ndim == 1 else (dims[1 - axis], dims[axis])
    specs = PartitionSpec(None, rows), PartitionSpec(columns)
    on_cpu = mesh.devices.flat[0].platform == CPU
    function = jax.shard_map(
        lambda array, of_rows, of_columns, nothing: _sums(
            array.astype(dtype), of_rows, of_columns, nothing if on_cpu else None, axis
        ),
        mesh=mesh,
        in_specs=(PartitionSpec(*dims), *specs, PartitionSpec()),
        out_specs=PartitionSpec(mesh.axis_names),
    )
    return jax.jit(function), (NamedSharding(mesh, specs[0]), NamedSharding(mesh, specs[1]))


def _sums(
    array: jax.Array,
    of_rows: jax.Array,
    of_columns: jax.Array,
    nothing: jax.Array | None,
    axis: int,
) -> jax.Array:
    """Return both sums of a shard, [1, 2]; on a CPU with the 0 of :func:`_summed_on_cpu`."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    words = bits.astype(jnp.uint32)
    if bits.dtype.itemsize > 2:
        words = (bits & 0xFFFF) + (bits >> 16) * np.uint32(_UPPER_HALF)
    if words.ndim == 2:
        weighted = words * (of_columns[:, None] if axis == 0 else of_columns)
        words = (
            jnp.sum(weighted, axis=axis, dtype=jnp.uint32)
            if nothing is None
            else _summed_on_cpu(weighted, axis, nothing)
        )
    return jnp.sum(words * of_rows, axis=1, dtype=jnp.uint32)[None]


def _summed_on_cpu(words: jax.Array, axis: int, nothing: jax.Array) -> jax.Array:
    """Return the sums along an axis without a copy of the array on a CPU.

    XLA's CPU compiler fuses a sum with the computation of its values only if they are few. So a few
    are summed first, and then many. It would join the two, hence ``nothing`` between them: a 0 that
    it does not know. On a TPU, whose arrays lie in tiles, the split itself would make a copy.
    """
    length = words.shape[axis]
    fitting = (k for k in range(_FEW, 1, -1) if length % k == 0 and length // k > _FEW)
    few = next(fitting, 1)
    split = (length // few, few) if axis == 0 else (few, length // few)
    shape = (*words.shape[:axis], *split, *words.shape[axis + 1 :])
    partly = jnp.sum(words.reshape(shape), axis=1, dtype=jnp.uint32)
    return jnp.sum(partly ^ nothing, axis=axis, dtype=jnp.uint32)


def _of_devices(sums: jax.Array) -> dict[str, list[int]]:
    """Return the sums of each of this host's devices, by its id."""
    return {
        str(shard.device.id): np.asarray(shard.data)[0].tolist()
        for shard in sums.addressable_shards
    }


def _whole(path: str, array: jax.Array, sums: Mapping[str, Iterable[int]]) -> Digest:
    """Return the digest of an array from the sums of the devices, each distinct shard once.

    Raises:
        EngineError: two devices that should hold the same do not.
    """
    shards: dict[Any, tuple[int, ...]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        held = tuple(sums[str(device.id)])
        if shards.setdefault(index, held) != held:
            raise EngineError(f"parameter {path!r}: {device} holds other values than its replica")
    first, second = (sum(values) % _MODULUS for values in zip(*shards.values(), strict=True))
    return first, second
