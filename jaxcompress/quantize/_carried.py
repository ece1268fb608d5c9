"""A quantized leaf on its way to a site: its parts, reshaped and transposed as fn does its array.

A quantized kernel in groups is stored `(groups, size, out)`: one axis of the array, two of its
codes. `CarriedCodes` says how many stored axes make up each axis of the array at hand. A transpose
permutes them, a reshape splits or merges the lists, and codes stay codes until a site is reached.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress import numerics
from jaxcompress.graph.leaves import Parted
from jaxcompress.numerics import Activation, Float, Format, Int, PerGroup, QArray, Scaled

_PLAIN = (jnp.float32, jnp.bfloat16, jnp.float16)
"""Dtypes of scales that go to a site as they are stored."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "zero", "activation_scale", "activation_zero", "original"),
    meta_fields=("path", "format", "activation_format", "dtype", "split"),
)
@dataclass(frozen=True, kw_only=True, eq=False)
class CarriedCodes(Parted):
    """What a variable of fn holds of a quantized leaf.

    Invariants: the parts have as many axes as `values`, each of its length there or 1; `split`
    adds up to that number.

    Attributes:
        values: Codes.
        scale: As stored, or float32 where it is a product of two levels.
        zero: float32 zero point, or `None`.
        activation_scale: Static scale of the activations that it meets, or `None`.
        activation_zero: Static zero point, or `None`.
        original: The array itself in the shape of `values`, where fn is run on it beside the
            codes; else `None`.
        path: The leaf's path.
        format: The leaf's format; its granularity is not that of the parts at hand.
        activation_format: The format of the activations that it meets, or `None`.
        dtype: The dtype of the array at hand.
        split: How many axes of `values` make up each axis of the array at hand.
    """

    values: Array
    scale: Array
    zero: Array | None
    activation_scale: Array | None
    activation_zero: Array | None
    original: Array | None
    path: str
    format: Format
    activation_format: Format | None
    dtype: Any
    split: tuple[int, ...]

    @property
    def activation(self) -> Activation | None:
        """How activations are rounded that are contracted with it."""
        if self.activation_format is None:
            return None
        return Activation(
            format=self.activation_format, scale=self.activation_scale, zero=self.activation_zero
        )

    def codes(self, dtype: Any, *, backend: str) -> Array:
        """Give the codes less their zero points as numbers, in the shape of `values`.

        Integers to 255, and float8, are exact in any float dtype of 16 bits or more. CUDA's
        compiler converts them inside the matmul if it is done in one step, and that of TPUs if
        it is done by way of float32; otherwise both write the converted weights out.
        """
        qtype = self.format.qtype
        if isinstance(qtype, Int | Float) and backend != "tpu":
            codes = self.values.astype(dtype)
            return codes if self.zero is None else codes - self.zero.astype(dtype)
        return qtype.to_numbers(self.values, jnp.ones((), jnp.float32), self.zero).astype(dtype)

    def numbers(self, dtype: Any = jnp.float32) -> Array:
        """Give the numbers that the codes stand for, rounded to a dtype, in the shape of `values`.

        A 16-bit scale multiplies integers in its own dtype, if it is the one asked for: the
        product is rounded once either way, and compilers need no wider copy of the scales.
        """
        qtype = self.format.qtype
        if self.scale.dtype == dtype and isinstance(qtype, Int) and dtype != jnp.float32:
            codes = self.values.astype(dtype)
            return (codes if self.zero is None else codes - self.zero.astype(dtype)) * self.scale
        scale = self.scale.astype(jnp.float32)
        return qtype.to_numbers(self.values, scale, self.zero).astype(dtype)

    def cast(self, dtype: Any) -> "CarriedCodes":
        """Describe the array in another floating dtype."""
        original = None if self.original is None else self.original.astype(dtype)
        return replace(self, dtype=dtype, original=original)

    def array(self) -> Array:
        """Give the array at hand: the original, where fn is run on it."""
        return self.dequantize() if self.original is None else self.original.reshape(self.shape)

    def dequantize(self) -> Array:
        """Give the array that the codes stand for."""
        return self.numbers().reshape(self.shape).astype(self.dtype)


def carry_codes(q: QArray, path: str, original: Array | None = None) -> CarriedCodes | None:
    """Start a leaf on its way.

    Args:
        q: The quantized leaf.
        path: Its path.
        original: The array to run fn on beside it, if any.

    Returns:
        The node; `None` where codes and scales do not multiply entry by entry: a `Basis`, or a
        granularity of one's own that blocks axes.
    """
    granularity, ndim = q.format.granularity, len(q.shape)
    if not isinstance(q.format.qtype, Scaled):
        return None
    split = [1] * ndim
    if isinstance(granularity, PerGroup):
        split[granularity.axis % ndim] = 2
    elif q.values.ndim != ndim:
        return None
    static = q.activation

    def stored(part: Array | None) -> Array | None:
        # As many axes as the array -> as many as the codes.
        if part is None:
            return None
        shape = [n for n, parts in zip(part.shape, split, strict=True) for n in (n, 1)[:parts]]
        return part.astype(jnp.float32).reshape(shape)

    node = CarriedCodes(
        values=q.values,
        scale=q.scale if q.scale.dtype in _PLAIN else numerics.effective_scale(q),
        zero=None if q.zero is None else q.zero.astype(jnp.float32),
        activation_scale=None if static is None else stored(static.scale),
        activation_zero=None if static is None else stored(static.zero),
        original=None if original is None else original.reshape(q.values.shape),
        path=path,
        format=q.format,
        activation_format=None if static is None else static.format,
        dtype=jnp.dtype(q.dtype),
        split=tuple(split),
    )
    return _without_single_group(node, axis=split.index(2)) if 2 in split else node


def _without_single_group(node: CarriedCodes, *, axis: int) -> CarriedCodes:
    """Merge a split axis whose one group is all of it."""
    if node.scale.shape[axis] > 1 or node.values.shape[axis] > 1:
        return node
    split = tuple(1 if k == axis else n for k, n in enumerate(node.split))
    return node.moved(lambda part: jnp.squeeze(part, axis), split=split)
