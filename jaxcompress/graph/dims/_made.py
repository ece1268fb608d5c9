"""How labels go through what fn makes itself: iotas, random keys and random numbers."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.dims._kept import Kept
from jaxcompress.graph.dims._rule import Axes, Step, register_dims
from jaxcompress.graph.program import _compat


@register_dims("iota", "random_bits", "rng_bit_generator", "empty")
class _Made:
    """Made at full size, then the kept indices are taken."""

    by_layer = True

    def follow(self, step: Step) -> list[Axes]:
        return step.fresh(uniform=not step.by_layer)

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        results = _compat.bind(eqn, operands)
        return [kept.take(x, k) for k, x in enumerate(results)]


@register_dims(
    "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap", "random_clone",
    "threefry2x32",
)  # fmt: skip
class _Keys:
    def follow(self, step: Step) -> list[Axes]:
        results, made = step.fresh(), "it is an axis of random keys"
        operands = itertools.chain(*step.operands)
        step.labels.freeze_all(operands, "random keys depend on it", otherwise=True)
        step.labels.freeze_all(itertools.chain(*results), made, otherwise=True)
        return results


@register_dims("random_gamma")
class _Gamma:
    """Draws one number for each entry of its second operand, by the entry's position."""

    def follow(self, step: Step) -> list[Axes]:
        keys, axes = step.operands
        for key, axis in zip(keys, axes, strict=False):
            step.labels.freeze(key, "random keys depend on it")
            step.labels.unify(key, axis)
        for axis in axes:
            step.uniform(axis)
        return [axes]

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        keys, shapes = operands
        for k, mask in enumerate(kept.operand(1)):
            if mask is not None:  # ones where others were: a number is drawn for each position
                whole = (*shapes.shape[:k], len(mask), *shapes.shape[k + 1 :])
                where = (*(slice(None) for _ in range(k)), np.flatnonzero(mask))
                shapes = jnp.ones(whole, shapes.dtype).at[where].set(shapes)
        return [kept.take(x) for x in _compat.bind(eqn, [keys, shapes])]
