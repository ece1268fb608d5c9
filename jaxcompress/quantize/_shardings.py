"""Where the parts of a quantized leaf live."""

from typing import Any

import jax
import numpy as np

from jaxcompress import numerics
from jaxcompress.numerics import QArray


def placed_like(q: QArray, leaf: Any) -> QArray:
    """Shard the parts of a quantized leaf like the array that it replaces.

    Args:
        q: The quantized leaf.
        leaf: The array.

    Returns:
        The quantized leaf, placed; as it is where the array has no sharding over a mesh.
    """
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return q
    return jax.device_put(q, shardings(q, sharding))


def shardings(q: QArray, sharding: jax.sharding.NamedSharding) -> QArray:
    """Say where the parts of a quantized leaf live, if the leaf lived there.

    Args:
        q: The quantized leaf (shapes are enough).
        sharding: The leaf's sharding.

    Returns:
        A `QArray` of shardings: each axis split as the leaf's was where its length divides, the
        groups of an axis in its place.
    """
    mesh, ndim = sharding.mesh, len(q.shape)
    names = (*sharding.spec, *(None,) * ndim)[:ndim]
    blocked: list[Any] = list(names)
    if isinstance(q.format.granularity, numerics.PerGroup):
        blocked.insert(q.format.granularity.axis % ndim + 1, None)

    def place(part: Any) -> jax.sharding.NamedSharding:
        spec = names if part.ndim == ndim else blocked
        kept = [
            name if name is not None and n % _ways(mesh, name) == 0 and n > 1 else None
            for n, name in zip(part.shape, [*spec, *(None,) * part.ndim], strict=False)
        ]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))

    return jax.tree.map(place, q)


def _ways(mesh: Any, names: Any) -> int:
    names = (names,) if isinstance(names, str) else names
    return int(np.prod([mesh.shape[name] for name in names]))
