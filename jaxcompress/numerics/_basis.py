"""Binary bases: a slice as a linear combination of a few sign vectors."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.errors import ArgumentError
from jaxcompress.numerics._qtypes import Limits, QType, packed_width


@dataclass(frozen=True, kw_only=True)
class Basis(QType):
    r"""A linear combination of k sign vectors, $x = \sum_i \alpha_i b_i$, $b_i \in \{-1, 1\}^n$.

    The k numbers $\alpha$ are the scale of a slice, along an extra last axis; an entry stores k
    sign bits.

    Attributes:
        name: What reports and files call it.
        bits: k, 1 to 8.

    Raises:
        ArgumentError: If `bits` is not in 1 to 8.

    Reference: Guo et al., "Network Sketching" (arXiv:1706.02021), algorithms 1 and 2: the greedy
    start and the least-squares refinement. Between fits the signs are re-chosen, for every entry
    the best of the $2^k$ combinations, as in Lin et al., "Towards Accurate Binary Convolutional
    Neural Network" (arXiv:1711.11294).
    """

    def __post_init__(self):
        if self.bits not in range(1, 9):
            raise ArgumentError(
                "bits", got=self.bits, expected="1 to 8 sign vectors", fix="2 to 4 are usual."
            )

    @property
    def storage(self) -> Any:
        """The narrowest XLA unsigned integer with k bits."""
        return jnp.dtype(f"uint{packed_width(self.bits)}")

    def to_values(
        self,
        x: Array,
        scale: Array,
        zero: Array | None,
        *,
        limits: Limits | None,
        noise: Array | None = None,
    ) -> Array:
        """Choose for every entry the nearest combination; see `QType.to_values`."""
        place = jnp.arange(self.bits, dtype=jnp.int32)

        def compare(code: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            codes, distance = best
            signs = ((code >> place) & 1) * 2 - 1
            other = jnp.abs(x - _combine(scale, [signs[i] for i in range(self.bits)]))
            return jnp.where(other < distance, code, codes), jnp.minimum(other, distance)

        start = (jnp.zeros_like(x, dtype=jnp.int32), jnp.full_like(x, jnp.inf))
        codes, _ = jax.lax.fori_loop(0, 2**self.bits, compare, start)
        return codes.astype(self.storage)

    def to_numbers(self, values: Array, scale: Array, zero: Array | None) -> Array:
        """Combine the sign vectors; see `QType.to_numbers`."""
        return _combine(scale, self._signs(values))

    def inside(self, x: Array, scale: Array, zero: Array | None, *, limits: Limits | None) -> Array:
        """Compare with the largest combination and half the last gap; see `QType.inside`."""
        sizes = jnp.abs(scale)
        return jnp.abs(x) <= sizes.sum(-1) + sizes.min(-1)

    def fit(self, x: Array, *, shared: tuple[int, ...], iterations: int) -> Array:
        """Fit the alphas of every slice: greedily, then by least squares and new signs in turn.

        Args:
            x: float32 numbers, of magnitude at most 1.
            shared: The axes that make up a slice.
            iterations: How many rounds of refinement; none makes a slice's error larger.

        Returns:
            Alphas: x's shape with 1 for the shared axes, and k at the end.
        """
        residual, greedy = x, []
        for _ in range(self.bits):
            alpha = jnp.abs(residual).mean(shared, keepdims=True)
            residual = jnp.where(residual < 0, residual + alpha, residual - alpha)
            greedy.append(alpha)

        def error(scale: Array, values: Array) -> Array:
            return jnp.square(x - self.to_numbers(values, scale, None)).sum(shared, keepdims=True)

        def refine(_: int, scale: Array) -> Array:
            values = self.to_values(x, scale, None, limits=None)
            refit = self._least_squares(x, values, shared)
            better = error(refit, values) < error(scale, values)  # false where the fit failed
            return jnp.where(better[..., None], refit, scale)

        return jax.lax.fori_loop(0, iterations, refine, jnp.stack(greedy, -1))

    def _least_squares(self, x: Array, values: Array, shared: tuple[int, ...]) -> Array:
        """Solve `(B^T B) alpha = B^T x` for the alphas of every slice."""
        signs = self._signs(values)
        gram = {
            (i, j): (signs[i] * signs[j]).mean(shared, keepdims=True)
            for i, j in itertools.combinations_with_replacement(range(self.bits), 2)
        }
        rows = [
            jnp.stack([gram[min(i, j), max(i, j)] for j in range(self.bits)], -1)
            for i in range(self.bits)
        ]
        # Sign vectors that coincide make the matrix singular; the ridge then shares alpha evenly.
        matrix = jnp.stack(rows, -2) + 1e-6 * jnp.eye(self.bits, dtype=x.dtype)
        target = jnp.stack([(sign * x).mean(shared, keepdims=True) for sign in signs], -1)
        return _solve(matrix, target)

    def _signs(self, values: Array) -> list[Array]:
        codes = values.astype(jnp.int32)
        return [(((codes >> i) & 1) * 2 - 1).astype(jnp.float32) for i in range(self.bits)]


def _solve(matrix: Array, target: Array) -> Array:
    """Solve small positive definite systems, `(..., k, k)` and `(..., k)`, by elimination.

    Unlike `jnp.linalg.solve` this is elementwise in the slices, and so stays sharded as they are.
    """
    k = target.shape[-1]
    rows = jnp.concatenate([matrix, target[..., None]], -1)  # (..., k, k + 1)
    for i in range(k):
        pivot = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
        cleared = rows - rows[..., i : i + 1] * pivot
        rows = jnp.where(jnp.arange(k)[:, None] == i, pivot, cleared)
    return rows[..., -1]


def _combine(scale: Array, signs: list[Array]) -> Array:
    """Sum `alpha_i b_i`, always in this order."""
    total = scale[..., 0] * signs[0].astype(scale.dtype)
    for i, sign in enumerate(signs[1:], start=1):
        total += scale[..., i] * sign.astype(scale.dtype)
    return total
