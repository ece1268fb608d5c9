"""Where the parts of a quantized leaf live."""

from typing import Any

import jax

from jaxcompress import numerics
from jaxcompress.graph.leaves import part_shardings, place_parts
from jaxcompress.numerics import QArray


def place_codes(q: QArray, leaf: Any) -> QArray:
    """Shard the parts of a quantized leaf like the array that it replaces.

    Args:
        q: The quantized leaf.
        leaf: The array.

    Returns:
        The quantized leaf, placed; as it is where the array has no sharding over a mesh.
    """
    return place_parts(q, leaf, lambda part: _axes_of(q, part))


def shardings(q: QArray, sharding: jax.sharding.NamedSharding) -> QArray:
    """Say where the parts of a quantized leaf live, if the leaf lived there.

    Args:
        q: The quantized leaf (shapes are enough).
        sharding: The leaf's sharding.

    Returns:
        A `QArray` of shardings: each axis split as the leaf's was where its length divides, the
        groups of an axis in its place.
    """
    return part_shardings(q, sharding, lambda part: _axes_of(q, part))


def _axes_of(q: QArray, part: Any) -> list[int | None]:
    """List the axis of the leaf that each axis of a part stands for."""
    ndim = len(q.shape)
    axes: list[int | None] = list(range(ndim))
    if part.ndim > ndim and isinstance(q.format.granularity, numerics.PerGroup):
        axes.insert(q.format.granularity.axis % ndim + 1, None)
    return (axes + [None] * part.ndim)[: part.ndim]
