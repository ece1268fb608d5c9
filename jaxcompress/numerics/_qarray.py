"""`QArray`: the pytree node that stands where a quantized leaf stood."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxcompress.numerics._format import Format
from jaxcompress.tree import LeafNode, nbytes


@partial(jax.tree_util.register_dataclass, data_fields=("scale", "zero"), meta_fields=("format",))
@dataclass(frozen=True, kw_only=True, eq=False)
class Activation:
    """How an activation is rounded before it meets a quantized weight.

    Attributes:
        format: Number type, `PerTensor()` or `PerToken()`, symmetry and range method.
        scale: float32, one for the whole activation of a site: as many axes as the weight, of
            length 1 but for those that tell stacked layers apart. `None` if each call finds its
            own ("dynamic").
        zero: Zero point as the scale; `None` if symmetric or dynamic.
    """

    format: Format
    scale: Array | None = None
    zero: Array | None = None

    @property
    def is_static(self) -> bool:
        """Whether the scale was settled beforehand."""
        return self.scale is not None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "zero", "global_scale", "activation"),
    meta_fields=("format", "dtype"),
)
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QArray(LeafNode):
    """An array in stored form: values, scale and zero point, with the format beside them.

    It is a pytree node of a few arrays, so `jit`, donation, sharding and checkpoints see
    through it; `jaxcompress.tree` counts it as one leaf.

    Invariants: `values` has the storage dtype of `format.qtype` and the blocked shape of
    `format.granularity`; `scale` and `zero` have as many axes (`scale` one more for a `Basis`),
    with 1 where entries share. `global_scale` is there exactly if `format.global_scale`, and has
    the scale's number of axes, each of one entry until `vmap` or a stack of layers adds longer
    ones in front; what a slice's codes are multiplied by is `effective_scale(q)`. Under
    `tree.map` all of them may be anything at all.

    Attributes:
        values: The stored codes.
        scale: One per slice, in `format.scale_dtype`.
        zero: The code of the number 0 per slice, in the storage dtype; `None` if symmetric.
        format: What the codes mean.
        dtype: The dtype of the array that this stands for.
        global_scale: float32, one for the whole array; `None` if the format has none.
        activation: How `quantize.execute` rounds the activations that are contracted with it;
            `None` leaves them as they are. It does not change what this stands for.

    Example:
        >>> from jaxcompress.numerics import PerGroup, int4, quantize
        >>> q = quantize(jax.numpy.ones((64, 10)), Format(int4, PerGroup(32)))
        >>> q.shape, q.values.shape, q.nbytes
        ((64, 10), (2, 32, 10), 400)
    """

    values: Array
    scale: Array
    zero: Array | None
    format: Format
    dtype: Any
    global_scale: Array | None = None
    activation: Activation | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        return self.format.granularity.unblocked_shape(self.values.shape)

    @property
    def ndim(self) -> int:
        """How many axes that array has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many entries that array has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that XLA keeps, of all its arrays; int4 takes half a byte."""
        return nbytes(jax.tree.leaves(self))

    def __repr__(self) -> str:
        parts = (self.values, self.scale, self.zero)
        if all(isinstance(part, jax.Array | None) for part in parts) and self.values is not None:
            shape = ",".join(map(str, self.shape))
            kind = f"{self.format.qtype.name}, {self.format.granularity}"
            return f"QArray({np.dtype(self.dtype).name}[{shape}] as {kind})"
        return "QArray(values={!r}, scale={!r}, zero={!r})".format(*parts)
