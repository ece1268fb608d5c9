"""`dot_general` with a quantized operand: by codes, or with the weights' scales after the sum.

The stored axes of the weights decide. Where no scale varies along what is summed, scales multiply
the result. Where groups do, codes are summed group by group (the groups are a batch axis, and
their sums are scaled and added), while float activations meet scaled weights over both axes at
once: `mgk,gkn->mn`, never reshaped after scaling, which compilers fuse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.quantize._carried import CarriedCodes
from jaxcompress.quantize.kernels import _codes as codes_of
from jaxcompress.quantize.kernels._codes import Operand
from jaxcompress.quantize.kernels._turns import in_turn

_IN_TURN = ("cpu",)
"""Backends on which groups are summed in turn: several times faster than as a batch, measured."""


@dataclass(frozen=True)
class Arrangement:
    """A contraction in terms of the stored axes of its weights.

    Attributes:
        pieces: For each axis of the activation, the lengths that it is cut into.
        x_contract: Axes of the cut activation that are summed.
        w_contract: Stored axes that they meet.
        x_batch: Batch axes of the cut activation.
        w_batch: Stored axes that they meet.
        x_free: Its other axes.
        w_free: The other stored axes.
        grouped: Which of the summed pairs have scales that vary along them.
        first: Whether the weights are the first operand.
        shape: The shape of the result.
    """

    pieces: tuple[tuple[int, ...], ...]
    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_batch: tuple[int, ...]
    x_free: tuple[int, ...]
    w_free: tuple[int, ...]
    grouped: tuple[bool, ...]
    first: bool
    shape: tuple[int, ...]

    def cut(self, part: Array) -> Array:
        """Cut the axes of the activation, or of its scale, into pieces."""
        lengths = [
            n  # a symbolic length, of which little can be asked, is in one piece
            for k, ns in enumerate(self.pieces)
            for n in (
                (part.shape[k],) if len(ns) == 1 else ns if part.shape[k] > 1 else (1,) * len(ns)
            )
        ]
        return part.reshape(lengths)

    @property
    def groups(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The summed axes with scales that vary, of activation and weights."""
        pairs = zip(self.x_contract, self.w_contract, self.grouped, strict=True)
        chosen = [(x, w) for x, w, grouped in pairs if grouped]
        return tuple(x for x, _ in chosen), tuple(w for _, w in chosen)

    @property
    def summed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The other summed axes."""
        pairs = zip(self.x_contract, self.w_contract, self.grouped, strict=True)
        chosen = [(x, w) for x, w, grouped in pairs if not grouped]
        return tuple(x for x, _ in chosen), tuple(w for _, w in chosen)

    def beside(self, part: Array, *, of_weights: bool) -> Array:
        """Bring a part without summed axes next to the result: `(*batch, *groups, *free)`."""
        if of_weights:
            summed, lead, free = self.summed[1], (*self.w_batch, *self.groups[1]), self.w_free
        else:
            summed, lead, free = self.summed[0], (*self.x_batch, *self.groups[0]), self.x_free
        part = jnp.transpose(part, (*lead, *free, *summed))
        shape = part.shape[: len(lead) + len(free)]
        ones = (1,) * len(self.x_free if of_weights else self.w_free)
        after = of_weights != self.first  # the first operand's free axes come first
        head, tail = shape[: len(lead)], shape[len(lead) :]
        return part.reshape((*head, *ones, *tail) if after else (*head, *tail, *ones))

    def total(self, part: Array, *, of_weights: bool) -> Array:
        """Sum codes along the summed axes, which stay with length 1."""
        return part.sum(self.summed[1 if of_weights else 0], keepdims=True, dtype=jnp.int32)


def arrange_axes(params: Any, operand: int, node: CarriedCodes, x: Any) -> Arrangement:
    """Work out how the stored axes of the weights meet those of an activation.

    Args:
        params: The parameters of the `dot_general`.
        operand: Which operand the weights are.
        node: The weights.
        x: The activation: anything with a shape.

    Returns:
        The arrangement.
    """
    contracts, batches = params["dimension_numbers"]
    w_contract, x_contract = contracts[operand], contracts[1 - operand]
    w_batch, x_batch = batches[operand], batches[1 - operand]
    stored, sizes = node.stored_axes, node.values.shape
    meets = dict(zip((*x_contract, *x_batch), (*w_contract, *w_batch), strict=True))
    pieces = [
        tuple(sizes[j] for j in stored[meets[k]]) if k in meets else (n,)
        for k, n in enumerate(x.shape)
    ]
    starts, total = [], 0
    for lengths in pieces:
        starts.append(total)
        total += len(lengths)
    axes = [tuple(range(starts[k], starts[k] + len(pieces[k]))) for k in range(len(pieces))]
    spread = lambda which, of: tuple(j for k in which for j in of[k])
    w_summed = spread(w_contract, stored)
    w_free = [k for k in range(node.ndim) if k not in (*w_contract, *w_batch)]
    x_free = [k for k in range(len(x.shape)) if k not in (*x_contract, *x_batch)]
    free = (
        *(node.shape[k] for k in (w_free if operand == 0 else ())),
        *(x.shape[k] for k in x_free),
        *(node.shape[k] for k in (w_free if operand == 1 else ())),
    )
    parts = [part for part in (node.scale, node.zero) if part is not None]
    varies = [any(part.shape[j] > 1 for part in parts) for j in w_summed]
    return Arrangement(
        pieces=tuple(pieces),
        x_contract=spread(x_contract, axes),
        w_contract=w_summed,
        x_batch=spread(x_batch, axes),
        w_batch=spread(w_batch, stored),
        x_free=spread(x_free, axes),
        w_free=spread(w_free, stored),
        grouped=tuple(varies),
        first=operand == 0,
        shape=(*(x.shape[k] for k in x_batch), *free),
    )


def _contract(
    how: Arrangement,
    x: Array,
    w: Array,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    **options: Any,
) -> Array:
    if how.first:
        (x_summed, w_summed), (x_batch, w_batch) = contract, batch
        return lax.dot_general(w, x, ((w_summed, x_summed), (w_batch, x_batch)), **options)
    return lax.dot_general(x, w, (contract, batch), **options)


def by_codes(params: Any, operand: int, node: CarriedCodes, x: Array, backend: str) -> Array:
    r"""Contract codes with codes; `node.activation` says how x becomes codes.

    $s_x s_w (\sum q_x q_w - z_w \sum q_x - z_x \sum q_w + n z_x z_w)$, summed once more over
    groups where scales vary along what is summed.

    Returns:
        float32, in the shape of the equation's result.
    """
    how = arrange_axes(params, operand, node, x)
    rounded, weights = codes_of.encode_sides("dot_general", params, operand, node, x, backend)
    acts = jax.tree.map(how.cut, rounded)
    plain = acts.zero is None and weights.zero is None and not how.x_batch
    if backend in _IN_TURN and any(how.grouped) and plain:
        sums = in_turn(how, acts, weights, codes_of.accumulator(node.format))
        # The same for all groups: -> (*free).
        scale = jnp.squeeze(how.beside(acts.scale, of_weights=False), range(len(how.groups[0])))
        return (sums * scale).reshape(how.shape)
    sums = _sum_products(how, acts, weights, codes_of.accumulator(node.format))
    scaled = (
        sums.astype(jnp.float32)
        * how.beside(weights.scale, of_weights=True)
        * how.beside(acts.scale, of_weights=False)
    )
    lead, groups = len(how.x_batch), len(how.groups[0])
    return scaled.sum(range(lead, lead + groups)).reshape(how.shape)


def _few_rows(how: Arrangement, x: Array, node: CarriedCodes) -> bool:
    """Tell whether the sums of all groups, float32, are smaller than the weights in x's dtype."""
    rows = math.prod(how.cut(x).shape[k] for k in how.x_free)
    depth = math.prod(node.values.shape[k] for k in how.summed[1])
    # A symbolic number of rows, of `jax.export`, may be any.
    return isinstance(rows, int) and 4 * rows <= depth * x.dtype.itemsize


def _in_groups(
    how: Arrangement, node: CarriedCodes, x: Array, backend: str, options: dict[str, Any]
) -> Array:
    """Contract group by group, as a batch; scale the sums and add them up."""
    batch = ((*how.x_batch, *how.groups[0]), (*how.w_batch, *how.groups[1]))
    sums = _contract(how, x, node.codes(x.dtype, backend=backend), how.summed, batch, **options)
    scaled = sums * how.beside(node.scale, of_weights=True).astype(sums.dtype)
    lead = len(how.x_batch)
    return scaled.sum(range(lead, lead + len(how.groups[0])))


def _sum_products(how: Arrangement, acts: Operand, weights: Operand, dtype: Any) -> Array:
    """Sum products of codes less zero points, per group: `(*batch, *groups, *free)`."""
    batch = ((*how.x_batch, *how.groups[0]), (*how.w_batch, *how.groups[1]))
    sums = _contract(
        how, acts.codes, weights.codes, how.summed, batch, preferred_element_type=dtype
    )
    beside_w = lambda part: how.beside(part, of_weights=True)
    beside_x = lambda part: how.beside(part, of_weights=False)
    if weights.zero is not None:
        sums -= beside_w(weights.zero) * beside_x(how.total(acts.codes, of_weights=False))
    if acts.zero is not None:
        sums -= beside_x(acts.zero) * beside_w(how.total(weights.codes, of_weights=True))
    if weights.zero is not None and acts.zero is not None:
        count = math.prod(weights.codes.shape[k] for k in how.summed[1])
        sums += jnp.int32(count) * beside_w(weights.zero) * beside_x(acts.zero)
    return sums


def by_weights(params: Any, operand: int, node: CarriedCodes, x: Array, backend: str) -> Array:
    """Contract a float activation with codes, scales after the sum where they do not vary in it.

    Where they do, scaled codes are contracted over both axes at once. CUDA's compiler would write
    these out; for few rows the groups are a batch there, whose sums are scaled and added.

    Returns:
        float32 (or wider, as x is), in the shape of the equation's result.
    """
    how = arrange_axes(params, operand, node, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    options = {"precision": params["precision"], "preferred_element_type": wide}
    summed, batch = (how.x_contract, how.w_contract), (how.x_batch, how.w_batch)
    if any(how.grouped) and backend == "gpu" and _few_rows(how, x, node):
        return _in_groups(how, node, how.cut(x), backend, options).reshape(how.shape)
    if any(how.grouped):
        w = node.numbers(x.dtype)
        return _contract(how, how.cut(x), w, summed, batch, **options).reshape(how.shape)
    sums = _contract(
        how, how.cut(x), node.codes(x.dtype, backend=backend), summed, batch, **options
    )
    scale = how.beside(node.scale, of_weights=True).astype(wide)
    return (sums * scale).reshape(how.shape)
