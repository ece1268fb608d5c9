"""Which leaves of params learn."""

import sys
from collections.abc import Mapping
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.tree import Params, Where


def learnable(params: Params) -> Where:
    """Choose the leaves that learn: floating arrays that are not mutable state.

    Mutable state is told by its kind where the tree says it: in a Linen `variables` dict every
    collection but `params`; in an `nnx.State` every variable that is not an `nnx.Param`; anywhere
    else what lies under a `batch_stats` key. Compressed leaves (`QArray`) do not learn.

    Args:
        params: Any pytree of arrays.

    Returns:
        A `where` for these params.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}}
        >>> list(tree.select(params, learnable(params)))
        ['params/w']
    """
    fixed = _nnx_state(params)
    is_linen = isinstance(params, Mapping) and "params" in params and not fixed

    def where(path: str, leaf: Any) -> bool:
        segments = path.split("/")
        if isinstance(leaf, tree.LeafNode) or not tree.is_floating(leaf) or path in fixed:
            return False
        return segments[0] == "params" if is_linen else "batch_stats" not in segments

    return where


def _nnx_state(params: Params) -> frozenset[str]:
    """List the paths of NNX variables other than `nnx.Param`: statistics, caches, counters."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        return frozenset()  # params cannot hold what nobody has imported
    flat = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )[0]
    return frozenset(
        tree.path_str(keypath)
        for keypath, leaf in flat
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param)
    )
