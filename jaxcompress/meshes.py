"""Explicit mesh axes, with which every operation has to say how its result is sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def find_explicit_mesh(*arrays: Any) -> Any:
    """Find the mesh that arrays are sharded over by their types.

    Args:
        *arrays: Any pytrees of arrays, traced ones too.

    Returns:
        The mesh of the first that lives on one with Explicit axes; `None` if there is none.
    """
    for x in jax.tree.leaves(arrays):
        sharding = getattr(jax.typeof(x), "sharding", None)
        if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
            return sharding.mesh
    return None


def call_with_auto_axes(
    f: Callable[..., Any], *args: Any, spec: PartitionSpec | None = None
) -> Any:
    """Call `f(*args)`, leaving the sharding inside to the compiler where mesh axes are Explicit.

    There, a reshape that cuts a sharded axis raises.

    Args:
        f: What to call; it may reshape freely.
        *args: Its arguments; closing over arrays would mix the two kinds of axes.
        spec: How the results are sharded on such a mesh; on every device by default.

    Returns:
        What f returns.

    Example:
        >>> call_with_auto_axes(lambda x: 2 * x, jax.numpy.ones(2)).tolist()
        [2.0, 2.0]
    """
    mesh = find_explicit_mesh(args)
    if mesh is None:
        return f(*args)
    out = NamedSharding(mesh, spec or PartitionSpec())
    automatic: Callable[..., Any] = jax.sharding.auto_axes(f, out_sharding=out)
    return automatic(*args)
