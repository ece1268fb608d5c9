"""Means of per-example metrics over a whole data set."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxcompress.errors import ArgumentError
from jaxcompress.train._data import Data, prefetch_batches
from jaxcompress.tree import Params


def evaluate(
    metrics: Callable[[Params, Any], Mapping[str, ArrayLike]],
    params: Params,
    data: Data,
    *,
    place: Callable[[Any], Any] = jax.device_put,
) -> dict[str, float]:
    """Average per-example metrics over the batches of one epoch of data.

    A smaller last batch is filled up to the size of the first and counted at its own size, so
    the mean is exact, nothing compiles twice and every batch can be sharded.

    Args:
        metrics: `(params, batch) -> {name: one value per example}`; it is jitted.
        params: Any pytree of arrays.
        data: For example `Batches(..., shuffle=False, drop_last=False)`.
        place: Puts a batch on the device; a `Step`'s own `place` for sharded params.

    Returns:
        `{name: mean}`.

    Raises:
        ArgumentError: If a metric is not one value per example.

    Example:
        >>> from jaxcompress import train
        >>> data = train.Batches(np.arange(5.0), batch_size=2, drop_last=False)
        >>> evaluate(lambda params, x: {"double": params * x}, 2.0, data)
        {'double': 4.0}
    """
    compiled = jax.jit(metrics)
    sums: dict[str, float] = collections.defaultdict(float)
    total, full = 0, _count_examples(data[0])
    start = lambda batch: (_count_examples(batch), compiled(params, place(_fill(batch, full))))
    # Two batches in flight keep the device busy without holding the whole set on it.
    for _, (size, values) in prefetch_batches(data, start, range(data.steps_per_epoch), depth=2):
        total += size
        for name, value in values.items():
            if value.shape != (full,):
                raise ArgumentError(
                    name,
                    got=f"shape {value.shape} for a batch of {full}",
                    expected=f"one value per example, ({full},)",
                    fix="Leave the averaging to evaluate.",
                )
            sums[name] += float(np.sum(np.asarray(value[:size], np.float64)))
    return {name: value / total for name, value in sums.items()}


def _count_examples(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _fill(batch: Any, full: int) -> Any:
    missing = full - _count_examples(batch)
    if not missing:
        return batch
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]), batch)
