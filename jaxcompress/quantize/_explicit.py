"""Explicit mesh axes: kernels run with automatic ones, and come out placed as the equation does.

With Explicit axes every operation has to know how its result is placed. A kernel sums over axes
that the equation has in one piece, so it could not say; the equation can.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress.quantize._carried import Carried


def placement(part: Any, axes: Sequence[Sequence[int]]) -> NamedSharding | None:
    """Say where an array lives that is stored in pieces.

    Args:
        part: What is stored.
        axes: For each axis of the array the axes of the part that make it up, major first.

    Returns:
        The sharding, by the major pieces; `None` where there are no Explicit axes.
    """
    sharding = getattr(jax.typeof(part), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    names = (*sharding.spec, *(None,) * part.ndim)
    spec = PartitionSpec(*(names[own[0]] if own else None for own in axes))
    return NamedSharding(sharding.mesh, spec)


def replicated(f: Callable[[Any], Any], x: Any) -> Any:
    """Call `f(x)`, with automatic axes and a result that is on every device, if there are Explicit.

    Args:
        f: What to call; it may reshape freely.
        x: An array.

    Returns:
        `f(x)`.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return f(x)
    out = NamedSharding(sharding.mesh, PartitionSpec())
    automatic: Callable[[Any], Any] = jax.sharding.auto_axes(f, out_sharding=out)
    return automatic(x)


def placed(
    kernel: Callable[..., Any], equation: Any, operands: Sequence[Any]
) -> Callable[..., Any]:
    """Run a kernel in the place of an equation.

    Args:
        kernel: `(*operands) -> result`.
        equation: A `graph.Equation`.
        operands: Its operands; some are nodes.

    Returns:
        The kernel, with its result placed as the equation would.
    """
    like = [_like(x) for x in operands]
    if not any(x.sharding for x in like):
        return kernel
    out = jax.eval_shape(equation.bind, *like).sharding
    automatic: Callable[..., Any] = jax.sharding.auto_axes(kernel, out_sharding=out)
    return automatic


def _like(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, Carried):
        where = placement(x.values, x.stored_axes)
    else:
        where = placement(x, [(k,) for k in range(jax.typeof(x).ndim)])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
