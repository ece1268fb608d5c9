"""One leaf that can be factorised: what each rank costs and loses, and the factors themselves."""

import abc
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.graph import Site
from jaxcompress.graph.sites import Form
from jaxcompress.lowrank._factors import Factors
from jaxcompress.lowrank._methods import Method


class Rung(NamedTuple):
    """A leaf at some ranks.

    Attributes:
        ranks: The ranks; `()` for the array itself.
        params: Entries that are stored.
        flops: Operations of its sites in one call of fn.
        loss: The negative logarithm of the share of its energy that is kept, 0 for all of it.
    """

    ranks: tuple[int, ...]
    params: int
    flops: int
    loss: float


@dataclass
class Candidate(abc.ABC):
    """A leaf that can be factorised.

    Attributes:
        path: Its path.
        leaf: Its array.
        form: Its matrices.
        sites: Where it is contracted.
        method: How it is factorised.
    """

    path: str
    leaf: Any
    form: Form
    sites: tuple[Site, ...]
    method: Method

    @property
    def dense(self) -> Rung:
        """The array itself."""
        return Rung((), math.prod(self.form.shape), sum(site.flops for site in self.sites), 0.0)

    @abc.abstractmethod
    def cost(self, ranks: tuple[int, ...]) -> tuple[int, int]:
        """Count the params and the FLOPs at some ranks."""

    @abc.abstractmethod
    def ladder(self, multiple: int) -> Iterator[tuple[int, ...]]:
        """List ranks, multiples of a number, from the most down; values are not needed."""

    @abc.abstractmethod
    def loss(self, ranks: tuple[int, ...]) -> float:
        """Give the share of its energy that is lost at some ranks."""

    @abc.abstractmethod
    def template(self, ranks: tuple[int, ...]) -> Factors:
        """Give the shapes of its factors."""

    @abc.abstractmethod
    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """Compute its factors."""


def rung(candidate: Candidate, ranks: tuple[int, ...]) -> Rung:
    """Describe a candidate at some ranks."""
    kept = max(1 - candidate.loss(ranks), np.finfo(np.float32).tiny)
    return Rung(ranks, *candidate.cost(ranks), -math.log(kept))


def saves(candidate: Candidate, ranks: tuple[int, ...]) -> bool:
    """Tell whether some ranks are below break-even, in params and in FLOPs."""
    params, flops = candidate.cost(ranks)
    return params < candidate.dense.params and flops < candidate.dense.flops


def saving(candidate: Candidate, multiple: int) -> list[tuple[int, ...]]:
    """List the ranks below break-even, from the most down."""
    return [ranks for ranks in candidate.ladder(multiple) if saves(candidate, ranks)]


def align(form: Form, part: Array, axes: Sequence[int]) -> Array:
    """Bring `(*lead, prod(axes), *ranks)` into the leaf's axes, 1 where it has none."""
    held = [*form.lead, *axes]
    sizes = [form.shape[k] for k in held]
    own = part.shape[len(form.lead) + 1 :]
    part = part.reshape(*sizes, *own)
    order = np.argsort(held).tolist()
    part = jnp.transpose(part, [*order, *range(len(held), part.ndim)])
    return part.reshape(*(n if k in held else 1 for k, n in enumerate(form.shape)), *own)


def template(form: Form, dtype: Any, axes: Sequence[int], ranks: Sequence[int]) -> Any:
    held = {*form.lead, *axes}
    shape = (*(n if k in held else 1 for k, n in enumerate(form.shape)), *ranks)
    return jax.ShapeDtypeStruct(shape, dtype)


def errors(candidate: Candidate, factors: Factors) -> tuple[float, float | None]:
    """Measure what factors are off by, relative: in the weights, and in what they give.

    Args:
        candidate: The leaf.
        factors: Its factors.

    Returns:
        `‖W - Ŵ‖ / ‖W‖`, and `‖X (W - Ŵ)‖ / ‖X W‖` where XᵀX was seen (otherwise `None`).
    """
    gram = getattr(candidate, "gram", None)
    weights, outputs = _errors(jnp.asarray(candidate.leaf), factors, gram, candidate.form)
    return float(weights), None if outputs is None else float(outputs)


@functools.partial(jax.jit, static_argnums=3)
def _errors(
    leaf: Array, factors: Factors, gram: Array | None, form: Form
) -> tuple[Array, Array | None]:
    w = form.to_matrices(leaf.astype(jnp.float32))
    off = form.to_matrices(factors.dense().astype(jnp.float32)) - w
    plain = _relative_norm(jnp.square(off).sum(), jnp.square(w).sum())
    if gram is None:
        return plain, None
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    power = lambda x: jnp.maximum(exact("...io,...ij,...jo->", x, gram, x), 0)
    return plain, _relative_norm(power(off), power(w))


def _relative_norm(error: Array, whole: Array) -> Array:
    return jnp.sqrt(error / jnp.where(whole > 0, whole, 1))
