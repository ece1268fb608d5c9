"""`Factors`: the pytree node that stands where a factorised leaf stood."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress import tree
from jaxcompress.errors import SelectionError
from jaxcompress.graph.leaves import Parted


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("left", "core", "right"), meta_fields=()
)
@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """An array as a product of thinner ones: `Σ_r left[..., r] right[..., r]`.

    The parts are ordinary arrays of params, with paths of their own (`mlp/kernel/left`): they are
    trained, counted, masked, quantized and stored like any others. `lowrank.execute` contracts
    them one after the other where fn contracts the array.

    Invariants: each part has the array's axes, of its length or 1 where the part does not vary
    along it, and the ranks behind. An axis that several parts have (experts, stacked layers)
    tells matrices apart. With a core, the array is
    `Σ_ab left[..., a] core[..., a, b] right[..., b]`.

    Attributes:
        left: `(*axes, rank)`: of a kernel `(in, out)` it is `(in, 1, rank)`.
        right: `(*axes, rank)`: `(1, out, rank)`.
        core: `(*axes, rank_in, rank_out)`, or `None`: the window of a Tucker-2 convolution.

    Example:
        >>> factors = Factors(left=jnp.ones((5, 1, 2)), right=jnp.ones((1, 7, 2)))
        >>> factors.shape, factors.ranks, factors.entries
        ((5, 7), (2,), 24)
    """

    left: Any
    right: Any
    core: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        parts = [part for part in (self.left, self.core, self.right) if part is not None]
        return tuple(max(lengths) for lengths in zip(*(p.shape for p in parts), strict=False))[
            : len(self.left.shape) - 1
        ]

    @property
    def ndim(self) -> int:
        """How many axes that array has."""
        return len(self.left.shape) - 1

    @property
    def dtype(self) -> Any:
        """The dtype of that array."""
        return self.left.dtype

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank; with a core, those of inputs and outputs."""
        if self.core is None:
            return (self.left.shape[-1],)
        return self.left.shape[-1], self.right.shape[-1]

    @property
    def entries(self) -> int:
        """How many numbers it stores."""
        return tree.count(self)

    def dense(self) -> Array:
        """Multiply the parts out.

        Returns:
            The array that it stands for.
        """
        return carry_factors(self, "").array()


def is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def densify(params: tree.Params) -> tree.Params:
    """Replace every `Factors` by the array that it stands for.

    Args:
        params: Params with `Factors` in it, or none.

    Returns:
        Params of the structure that fn takes.

    Example:
        >>> factors = Factors(left=jnp.ones((5, 1, 2)), right=jnp.ones((1, 7, 2)))
        >>> densify({"kernel": factors})["kernel"].shape
        (5, 7)
    """
    return jax.tree.map(lambda x: x.dense() if is_factors(x) else x, params, is_leaf=is_factors)


def restore(params: tree.Params) -> tree.Params:
    """Make `Factors` of what `export.load` gives in their place without a `like`: mappings.

    Args:
        params: Params with mappings of `left`, `core` and `right`.

    Returns:
        Params with `Factors`.

    Raises:
        SelectionError: If there are none.

    Example:
        >>> parts = {"left": jnp.ones((5, 1, 2)), "core": None, "right": jnp.ones((1, 7, 2))}
        >>> restore({"kernel": parts})["kernel"].shape
        (5, 7)
    """

    def is_parts(x: Any) -> bool:
        return isinstance(x, Mapping) and set(x) == {"left", "core", "right"}

    if not any(map(is_parts, jax.tree.leaves(params, is_leaf=is_parts))):
        raise SelectionError(
            "params",
            got="params without mappings of left, core and right",
            expected="params with factorised leaves, as export.load gives them",
            fix="With export.load(path, like=params) they are Factors already.",
        )
    return jax.tree.map(lambda x: Factors(**x) if is_parts(x) else x, params, is_leaf=is_parts)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("left", "core", "right"),
    meta_fields=("path", "split"),
)
@dataclass(frozen=True, kw_only=True, eq=False)
class CarriedFactors(Parted):
    """What a variable of fn holds of a factorised leaf.

    Attributes:
        left: As in `Factors`, with stored axes.
        core: Likewise.
        right: Likewise.
        path: The leaf's path.
        split: How many stored axes make up each axis of the array at hand.
    """

    left: Array
    core: Array | None
    right: Array
    path: str
    split: tuple[int, ...]

    @property
    def parts(self) -> tuple[Array, ...]:
        """The parts in the order of the product."""
        return (self.left, self.right) if self.core is None else (self.left, self.core, self.right)

    @property
    def dtype(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dtype of the array at hand."""
        return self.left.dtype

    def cast(self, dtype: Any) -> "CarriedFactors":
        """Describe the array in another floating dtype."""
        return self.moved(lambda part: part.astype(dtype))

    def array(self) -> Array:
        """Multiply the parts out."""
        axes = range(len(self.lengths))
        rank = len(self.lengths)
        tails = [[rank], [rank]] if self.core is None else [[rank], [rank, rank + 1], [rank + 1]]
        operands: list[Any] = []
        for number, (part, tail) in enumerate(zip(self.parts, tails, strict=True)):
            held = [k for k in axes if part.shape[k] > 1 or (self.lengths[k] == 1 and not number)]
            kept = [*held, *range(rank, part.ndim)]
            operands += [part.reshape([part.shape[k] for k in kept]), [*held, *tail]]
        exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        return exact(*operands, list(axes)).reshape(self.shape)


def carry_factors(factors: Factors, path: str) -> CarriedFactors:
    """Start a leaf on its way.

    Args:
        factors: The factorised leaf.
        path: Its path.

    Returns:
        The node.
    """
    return CarriedFactors(
        left=factors.left,
        core=factors.core,
        right=factors.right,
        path=path,
        split=(1,) * factors.ndim,
    )
