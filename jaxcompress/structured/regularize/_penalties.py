"""What regularisers of units share: params by path, figures that follow the step, checks."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike

from jaxcompress import linalg, tree
from jaxcompress.errors import ArgumentError

Figure: TypeAlias = float | ArrayLike | Callable[[jax.Array], ArrayLike]
"""A number, or a function of the number of updates seen so far, as optax has them."""


def figure_at(figure: Figure, step: jax.Array) -> jax.Array:
    """Give a figure at a step, in float32."""
    value = figure(step) if callable(figure) else figure
    return jnp.asarray(value).astype(jnp.float32)


def check_figure(name: str, figure: Figure, *, fix: str) -> None:
    """Refuse a number that is negative or not finite; what a function gives is not known yet."""
    if callable(figure) or isinstance(figure, Tracer):
        return
    if np.ndim(figure) or not (np.isfinite(figure) and figure >= 0):  # pyright: ignore
        raise ArgumentError(name, got=f"{figure}", expected="a number of at least 0", fix=fix)


def require_params(params: tree.Params | None) -> tree.Params:
    """Refuse an update without params, as optax does."""
    if params is None:
        raise ArgumentError(
            "params",
            got="None",
            expected="the params that the updates are for",
            fix="Call tx.update(grads, state, params).",
        )
    return params


def widen_to_float32(x: jax.Array) -> jax.Array:
    """Widen to float32 or more."""
    return x.astype(linalg.common_float(x.dtype, jnp.float32))


def add_penalty(
    updates: tree.Params,
    params: tree.Params,
    penalties: dict[str, jax.Array],
    gradient: Callable[[jax.Array], jax.Array],
) -> tree.Params:
    """Add penalty * gradient(p) to the gradients of the leaves that have a penalty."""

    def add(path: str, p: Any, g: Any) -> Any:
        if path not in penalties or g is None:
            return g
        more = penalties[path].astype(widen_to_float32(p).dtype) * gradient(widen_to_float32(p))
        common = linalg.common_float(widen_to_float32(g).dtype, more.dtype)
        return (g.astype(common) + more.astype(common)).astype(g.dtype)

    return tree.map_with_path(add, params, updates)
