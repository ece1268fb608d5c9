"""BatchNorm folding as a transformation of functions (arXiv:1712.05877, section 3.2)."""

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress import graph, tree
from jaxcompress.errors import SelectionError
from jaxcompress.tree import Params, Where


def fold_norm(
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    where: Where = "**",
    **kwargs: Any,
) -> tuple[Callable[..., Any], Params]:
    """Fold inference BatchNorm, and any other scale per channel, into the kernels before it.

    Of a contraction `y = x W`, followed by `A y + B` with `A` and `B` from params alone, it makes
    `x (A W) + B`: for BatchNorm, `A = scale / sqrt(var + eps)` and `B = bias - mean A`. What is
    affine is found in fn's jaxpr (`graph.affine`), so it can be anyone's BatchNorm, a layer
    scale, grouped or depthwise convolutions, dense layers, and stacked layers in a scan.

    fn' leaves out all of the chain but the addition of one leaf; params' have the structure,
    shapes and dtypes of params, with `A W` for the kernel and `B` for that leaf (the last to be
    added that is no one else's: the norm's bias, or else the layer's bias, or else minus the
    mean). Where the chain has a scale of its own and only leaves of its own are added, params'
    suit fn as well: the scale becomes `1 / A` at a scale of one, the others zero. BatchNorm with
    a scale has it so; without one, params' suit fn' only.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure, in inference mode.
        params: Any pytree of arrays.
        *inputs: fn's other arguments; shapes are enough. fn' takes any that fn takes.
        where: The kernels to fold into; see `tree.matches`. What cannot be folded is left as it
            is; `foldable` says why.
        **kwargs: fn's keyword arguments.

    Returns:
        `(fn', params')`, with `fn'(params', ...)` equal to `fn(params, ...)` up to rounding.

    Raises:
        SelectionError: If `where` selects no site of fn, or none that can be folded.

    Example:
        >>> import jax.numpy as jnp
        >>> def fn(params, x):
        ...     y = (x @ params["kernel"] - params["mean"]) / jnp.sqrt(params["var"])
        ...     return y * params["scale"] + params["bias"]
        >>> params = {name: jnp.full(2, v) for name, v in
        ...           {"mean": 1.0, "var": 4.0, "scale": 3.0, "bias": 5.0}.items()}
        >>> params["kernel"], x = jnp.ones((3, 2)), jnp.ones((1, 3))
        >>> folded, params_ = fold_norm(fn, params, x)
        >>> params_["kernel"][0].tolist(), params_["bias"].tolist()
        ([1.5, 1.5], [3.5, 3.5])
        >>> fn(params, x).tolist(), folded(params_, x).tolist(), fn(params_, x).tolist()
        ([[8.0, 8.0]], [[8.0, 8.0]], [[8.0, 8.0]])
    """
    chains = graph.affine(fn, params, *inputs, **kwargs)
    leaves = dict(tree.items(params))
    selected = [c for c in chains.values() if tree.matches(where, c.site.path, leaves[c.site.path])]
    chosen = [chain for chain in selected if chain.unfoldable is None]
    if not chosen:
        raise _nothing_to_fold(where, selected, chains)

    @jax.jit
    def new_leaves(leaves: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for chain in chosen:
            changed |= chain.folded(leaves)
        return changed

    read = {path for chain in chosen for path in (chain.site.path, *chain.leaves)}
    changed = new_leaves({path: leaf for path, leaf in leaves.items() if path in read})
    folded = tree.map_with_path(lambda path, leaf: changed.get(path, leaf), params)
    return graph.bypass(fn, [chain.site.name for chain in chosen]), folded


def foldable(
    fn: Callable[..., Any], params: Params, *inputs: Any, **kwargs: Any
) -> dict[str, str | None]:
    """Say of each contraction whether `fold_norm` folds what follows it, and if not, why.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; shapes are enough.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        `{Site.name: None, or the reason}` in fn's order.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"] * p["scale"] + p["bias"]) @ p["b"]
        >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}
        >>> params |= {"scale": jnp.ones(2), "bias": jnp.ones(2)}
        >>> foldable(fn, params, jnp.ones(3))
        {'a': None, 'b': 'no leaf scales its result: its result is what fn returns'}
    """
    chains = graph.affine(fn, params, *inputs, **kwargs)
    return {name: chain.unfoldable for name, chain in chains.items()}


def _nothing_to_fold(
    where: Where, selected: list[graph.Chain], chains: dict[str, graph.Chain]
) -> SelectionError:
    if not selected:
        paths = list(dict.fromkeys(chain.site.path for chain in chains.values()))
        return SelectionError(
            "where",
            got=f"{where!r}, which selects no kernel that fn contracts",
            expected="a `where` over kernels",
            fix=f"They are: {tree.shorten(paths)}." if paths else "fn contracts no leaf of params.",
        )
    # The nearest to being folded first: a scale follows, but something is in the way.
    nearest = sorted(selected, key=lambda c: str(c.unfoldable).startswith("no leaf scales"))
    reasons = "; ".join(f"{c.site.name!r}: {c.unfoldable}" for c in nearest[:4])
    return SelectionError(
        "where",
        got=f"{where!r}, none of whose {len(selected)} sites can be folded ({reasons})",
        expected="at least one contraction that a scale per channel follows",
        fix="Trace fn in inference mode; `quantize.foldable` lists the reasons of all sites.",
    )
