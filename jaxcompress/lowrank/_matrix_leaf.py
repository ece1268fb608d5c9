"""A leaf whose matrices are factorised by SVD."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph.sites import Form
from jaxcompress.linalg import vmap_leading
from jaxcompress.lowrank._candidate import Candidate, align, template
from jaxcompress.lowrank._factors import Factors
from jaxcompress.lowrank._methods import ActivationSVD, Method, break_even
from jaxcompress.lowrank._svd import Pair, activation_svd, svd


@dataclass
class MatrixCandidate(Candidate):
    """A leaf whose matrices are factorised by SVD, one rank for all of them.

    Attributes:
        gram: `(*lead, in, in)` XᵀX of what its matrices contract, if the method asks for it.
    """

    gram: Array | None = field(default=None, repr=False)

    @property
    def _sides(self) -> tuple[int, int]:
        shape = self.form.shape
        inner, outer = self.form.inner, self.form.outer
        return math.prod(shape[k] for k in inner), math.prod(shape[k] for k in outer)

    def cost(self, ranks: tuple[int, ...]) -> tuple[int, int]:
        """Count the params and the FLOPs at some ranks: both shrink alike."""
        (rank,), (inner, outer) = ranks, self._sides
        dense, whole, thin = self.dense, inner * outer, rank * (inner + outer)
        return dense.params // whole * thin, dense.flops // whole * thin

    def ladder(self, multiple: int) -> Iterator[tuple[int, ...]]:
        """List ranks, multiples of a number, from the most below break-even down."""
        most = break_even(*self._sides) // multiple * multiple
        return ((rank,) for rank in range(most, 0, -multiple))

    def loss(self, ranks: tuple[int, ...]) -> float:
        """Give the share of its energy that is lost at some ranks."""
        return float(self._tails[ranks[0]])

    def template(self, ranks: tuple[int, ...]) -> Factors:
        """Give the shapes of its factors."""
        make = functools.partial(template, self.form, self.leaf.dtype, ranks=ranks)
        return Factors(left=make(axes=self.form.inner), right=make(axes=self.form.outer))

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """Compute its factors."""
        return _factors(self._pair, self.form, ranks[0], jnp.dtype(self.leaf.dtype))

    @functools.cached_property
    def _pair(self) -> Pair:
        """Factors of the rank at break-even; those of lower ranks are the first of them."""
        rank = max(break_even(*self._sides), 1)
        return _pair(jnp.asarray(self.leaf), self.gram, self.form, rank, self.method)

    @functools.cached_property
    def _tails(self) -> np.ndarray:
        """The share of energy beyond each rank, over all matrices."""
        squares = np.square(np.asarray(self._pair.values, np.float64))
        squares = squares.reshape(-1, squares.shape[-1]).sum(0)
        tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        return tails / tails[0] if tails[0] else tails


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _pair(leaf: Array, gram: Array | None, form: Form, rank: int, method: Method) -> Pair:
    w = form.to_matrices(leaf.astype(jnp.float32))
    if isinstance(method, ActivationSVD):
        f = functools.partial(activation_svd, rank=rank, damping=method.damping)
        return vmap_leading(f, len(form.lead))(w, gram)
    return vmap_leading(functools.partial(svd, rank=rank), len(form.lead))(w)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _factors(pair: Pair, form: Form, rank: int, dtype: Any) -> Factors:
    left = pair.left[..., :rank]
    right = jnp.swapaxes(pair.right, -1, -2)[..., :rank]
    return Factors(
        left=align(form, left, form.inner).astype(dtype),
        right=align(form, right, form.outer).astype(dtype),
    )
