"""Trainable gates on residual blocks: depth by sparsity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.structured.depth._blocks import analyse
from jaxcompress.structured.depth._dropped import check_leaves
from jaxcompress.structured.depth._gated import run_gated
from jaxcompress.structured.depth._influence import check_scores
from jaxcompress.structured.depth._units import Level, block_gates, gate_shapes, units_of
from jaxcompress.structured.regularize._penalties import (
    Figure,
    check_figure,
    figure_at,
    require_params,
)


def gate(
    fn: Callable[..., Any],
    params: tree.Params,
    *inputs: Any,
    level: Level = "layer",
    **kwargs: Any,
) -> tuple[Callable[..., Any], tree.Params]:
    """Put a trainable gate on each residual branch, `x + g f(x)`.

    Trained with a penalty on the gates (see `sparse_gates`), those of blocks that matter little
    go to zero, and these can be dropped. To keep the other gates as they were learned, drop the
    blocks of the gated function, whose names begin with `params/`:
    `drop_layers(gated, trained, "params/layers_0", x)`.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays.
        *inputs: fn's other arguments; shapes are enough.
        level: "layer" for one gate on all branches of a layer, or "block" for one on each.
        **kwargs: fn's keyword arguments.

    Returns:
        `(gated, {"gates": {name: g}, "params": params})`: a function of such params and of fn's
        inputs, and its first params, with which it is fn. A gate is a float32 number, or
        `(length,)` for layers of a stack.

    Raises:
        ArgumentError: If fn has no residual blocks, or the level is neither.

    Example:
        >>> fn = lambda params, x: x + x @ params["w"]
        >>> gated, params = gate(fn, {"w": jnp.eye(2)}, jnp.ones((1, 2)))
        >>> params["gates"]["w"] = jnp.float32(0.5)
        >>> gated(params, jnp.ones((1, 2))).tolist()
        [[1.5, 1.5]]

    Reference:
        Huang and Wang, Data-driven sparse structure selection for deep neural networks,
        arXiv:1707.01213, equation 7 (a scaling factor on each residual block).
    """
    analysis = analyse(fn, params, inputs, kwargs)
    units_of(analysis, level)  # raises if there are none
    shapes = gate_shapes(analysis, level)
    gates = {name: jnp.ones(shape, jnp.float32) for name, shape in shapes.items()}

    def gated(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        given = params["gates"]
        check_leaves({"": given}, {f"/{n}": s for n, s in shapes.items()}, "the gates of `gate`")
        analysis = analyse(fn, params["params"], inputs, kwargs)
        args = (params["params"], inputs, kwargs)
        return run_gated(analysis, args, block_gates(analysis, given, level))

    return gated, {"gates": gates, "params": params}


def gate_scores(params: tree.Params) -> dict[str, float]:
    """Read the sizes of gates as scores.

    Args:
        params: Params of a gated function, as `gate` gives them.

    Returns:
        `{unit: |g|}`, `layers[i]` for layer i of a stack, named as in fn.

    Raises:
        ArgumentError: If params have no gates.
        NonFiniteError: If a gate is NaN.

    Example:
        >>> gate_scores({"gates": {"layers": jnp.array([0.5, -2.0])}, "params": {}})
        {'layers[0]': 0.5, 'layers[1]': 2.0}
    """
    if not isinstance(params, dict) or "gates" not in params:
        raise ArgumentError(
            "params",
            got=type(params).__name__,
            expected='{"gates": {name: g}, "params": params}',
            fix="Pass the params of the gated function that `gate` gives.",
        )
    scores = {}
    for name, value in params["gates"].items():
        sizes = jnp.abs(value)
        if sizes.ndim == 0:
            scores[name] = float(sizes)
        else:
            scores |= {f"{name}[{i}]": float(x) for i, x in enumerate(sizes)}
    return check_scores(scores)


class SparseGatesState(NamedTuple):
    """State of `sparse_gates`.

    Attributes:
        step: Updates seen so far.
    """

    step: Int[Array, ""]


def sparse_gates(
    strength: Figure, *, where: tree.Where = "gates/**"
) -> optax.GradientTransformation:
    """Shrink gates towards zero after each update: the proximal step of an L1 penalty.

    `g <- sign(g) max(|g| - strength, 0)`, exactly zero in the end. It goes last in a chain:
    `optax.chain(optax.sgd(lr), sparse_gates(lr * penalty))`.

    Args:
        strength: What is taken off in one update, learning rate times penalty; at least 0, a
            number or a function of the update count.
        where: The leaves that are gates.

    Returns:
        An optax transformation.

    Raises:
        ArgumentError: If the strength is negative or not finite; in `update`, if params are
            missing.
        SelectionError: In `init`, if there are no such leaves.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), sparse_gates(0.25))
        >>> params = {"gates": {"a": jnp.float32(1.0), "b": jnp.float32(0.25)}}
        >>> zero = {"gates": {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}}
        >>> updates, _ = tx.update(zero, tx.init(params), params)
        >>> {k: float(v) for k, v in optax.apply_updates(params, updates)["gates"].items()}
        {'a': 0.75, 'b': 0.0}

    Reference:
        Huang and Wang, arXiv:1707.01213, section 3.3 (there accelerated proximal gradient).
    """
    check_figure("strength", strength, fix="Learning rate times penalty, such as 0.1 * 1e-3.")

    def init(params: tree.Params) -> SparseGatesState:
        tree.select(params, where)
        return SparseGatesState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: tree.Params | None = None
    ) -> tuple[Any, SparseGatesState]:
        params = require_params(params)
        off = figure_at(strength, state.step)

        def shrink(path: str, p: Any, u: Any) -> Any:
            return soft_threshold(p + u, off) - p if tree.matches(where, path, p) else u

        shrunk = tree.map_with_path(shrink, params, updates)
        return shrunk, SparseGatesState(step=jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformation(init, update)


def soft_threshold(
    x: Float[ArrayLike, "*shape"], strength: float | ArrayLike
) -> Float[Array, "*shape"]:
    """Take `strength` off the size of each entry, down to zero.

    Args:
        x: Any array.
        strength: At least 0.

    Returns:
        `sign(x) max(|x| - strength, 0)`, in the dtype of x.

    Example:
        >>> soft_threshold(jnp.array([-3.0, 0.5]), 1.0)
        Array([-2.,  0.], dtype=float32)
    """
    x = jnp.asarray(x)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - jnp.asarray(strength, x.dtype), 0)
