"""Hold the weights of a live engine against their source, by their digests.

For functions that run on the scheduler's thread. With ``engine.weight_digests=false`` nothing is
computed, and a proof is empty.
"""

from collections.abc import Mapping
from typing import Any

import jax

from kvpipe.engine import digests
from kvpipe.engine.digests import Digest, Heads, Proof, Rule
from kvpipe.engine.params import Param, ParamTable
from kvpipe.engine.sglang import SglangEngine
from kvpipe.engine.weight_map import Leaf

Blueprint = Mapping[str, Param]


class ParamSet(dict[str, jax.Array]):
    """A parameter set by path, with the digests that its leaves have if they are their sources'.

    Attributes:
        digests: by path; empty without digests.
    """

    digests: Mapping[str, Digest] = {}


def rules_of(
    engine: SglangEngine, leaves: Mapping[str, Leaf], blueprint: Blueprint
) -> dict[str, Rule]:
    """Return :func:`rules_of_model` of an engine; empty without digests."""
    return rules_of_model(engine.runner, leaves, blueprint) if engine.proves_weights else {}


def rules_of_model(
    runner: Any, leaves: Mapping[str, Leaf], blueprint: Blueprint
) -> dict[str, Rule]:
    """Return the source of the elements of each parameter, by path.

    Args:
        runner: the engine's model runner; only its config of the model is used.
        leaves: the checkpoint tensor behind each parameter, by path; only the names are used.
        blueprint: required shape of each parameter, by path.
    """
    config = runner.model_config
    query = config.num_attention_heads
    widths = [like.shape[-1] for path, like in blueprint.items() if ".q_proj." in path]
    engine_dim = widths[0] // query if widths else config.head_dim
    heads = Heads(query, config.get_total_num_kv_heads(), config.head_dim, engine_dim)
    return {
        path: digests.rule_of(leaf.source, blueprint[path].shape, heads)
        for path, leaf in leaves.items()
    }


def of_trained(
    rules: Mapping[str, Rule], blueprint: Blueprint, trained: Mapping[str, jax.Array]
) -> dict[str, Digest]:
    """Return the digest that each parameter has if it is exactly the trained one, by path."""
    return digests.of_trainer(rules, trained, {path: blueprint[path].dtype for path in rules})


def prove(
    engine: SglangEngine,
    table: ParamTable,
    rules: Mapping[str, Rule],
    expected: Mapping[str, Digest],
) -> Proof:
    """Compute the digests of the engine's parameters; return them, and remember them as its proof.

    Args:
        engine: the engine, with all its parameters on the devices.
        table: its parameters.
        rules: where their elements come from, by path; empty without digests.
        expected: the digests of their sources, by path; empty if nothing is known of them.
    """
    if not rules:
        engine.proof = Proof()
        return engine.proof
    params: Mapping[str, Any] = table.params
    leaves = digests.of_engine(rules, params)
    wrong = tuple(path for path in sorted(expected) if leaves[path] != expected[path])
    whole = digests.of_set(rules, params, leaves)
    if wrong:  # of a repeated KV head the digest of the set counts the first copy only
        whole = f"wrong-{whole}"
    engine.proof = Proof(leaves, whole, bool(expected), wrong)
    return engine.proof
