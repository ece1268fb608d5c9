"""One leaf that can be factorised: what each rank costs and loses, and the factors themselves."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.graph import Site
from jaxcompress.graph._forms import Form
from jaxcompress.lowrank._factors import Factors
from jaxcompress.lowrank._methods import ActivationSVD, Method, Tucker2, break_even
from jaxcompress.lowrank._svd import Pair, activation_svd, svd
from jaxcompress.lowrank._tucker import Tucker, spectra, tucker2


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


class Candidate(Protocol):
    """A leaf that can be factorised.

    Attributes:
        path: Its path.
        leaf: Its array.
        form: Its matrices.
        method: How it is factorised.
    """

    path: str
    leaf: Any
    form: Form
    method: Method

    @property
    def dense(self) -> Rung:
        """The array itself."""
        ...

    def cost(self, ranks: tuple[int, ...]) -> tuple[int, int]:
        """Count the params and the FLOPs at some ranks."""
        ...

    def ladder(self, multiple: int) -> Iterator[tuple[int, ...]]:
        """List ranks, multiples of a number, from the most down; values are not needed."""
        ...

    def loss(self, ranks: tuple[int, ...]) -> float:
        """Give the share of its energy that is lost at some ranks."""
        ...

    def template(self, ranks: tuple[int, ...]) -> Factors:
        """Give the shapes of its factors."""
        ...

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """Compute its factors."""
        ...


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


def _aligned(form: Form, part: Array, axes: Sequence[int]) -> Array:
    """Bring `(*lead, prod(axes), *ranks)` into the leaf's axes, 1 where it has none."""
    held = [*form.lead, *axes]
    sizes = [form.shape[k] for k in held]
    own = part.shape[len(form.lead) + 1 :]
    part = part.reshape(*sizes, *own)
    order = np.argsort(held).tolist()
    part = jnp.transpose(part, [*order, *range(len(held), part.ndim)])
    return part.reshape(*(n if k in held else 1 for k, n in enumerate(form.shape)), *own)


def _template(form: Form, dtype: Any, axes: Sequence[int], ranks: Sequence[int]) -> Any:
    held = {*form.lead, *axes}
    shape = (*(n if k in held else 1 for k, n in enumerate(form.shape)), *ranks)
    return jax.ShapeDtypeStruct(shape, dtype)


def _mapped(f: Any, lead: Sequence[int]) -> Any:
    for _ in lead:
        f = jax.vmap(f)
    return f


# --- Matrices ------------------------------------------------------------------------------------


@dataclass
class MatrixCandidate:
    """A leaf whose matrices are factorised by SVD, one rank for all of them.

    Attributes:
        path: Its path.
        leaf: Its array.
        form: Its matrices.
        sites: Where it is contracted.
        method: `SVD` or `ActivationSVD`.
        gram: `(*lead, in, in)` XᵀX of what its matrices contract, if the method asks for it.
    """

    path: str
    leaf: Any
    form: Form
    sites: tuple[Site, ...]
    method: Method
    gram: Array | None = field(default=None, repr=False)

    @property
    def _sides(self) -> tuple[int, int]:
        shape = self.form.shape
        inner, outer = self.form.inner, self.form.outer
        return math.prod(shape[k] for k in inner), math.prod(shape[k] for k in outer)

    @property
    def dense(self) -> Rung:
        """The array itself."""
        return Rung((), math.prod(self.form.shape), sum(site.flops for site in self.sites), 0.0)

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
        make = functools.partial(_template, self.form, self.leaf.dtype, ranks=ranks)
        return Factors(left=make(axes=self.form.inner), right=make(axes=self.form.outer))

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """Compute its factors."""
        pair, dtype = self._pair, self.leaf.dtype
        left = pair.left[..., : ranks[0]]
        right = jnp.swapaxes(pair.right, -1, -2)[..., : ranks[0]]
        return Factors(
            left=_aligned(self.form, left, self.form.inner).astype(dtype),
            right=_aligned(self.form, right, self.form.outer).astype(dtype),
        )

    @functools.cached_property
    def _pair(self) -> Pair:
        """Factors of the rank at break-even; those of lower ranks are the first of them."""
        w = self.form.to_matrices(jnp.asarray(self.leaf).astype(jnp.float32))
        rank = max(break_even(*self._sides), 1)
        if isinstance(self.method, ActivationSVD):
            f = functools.partial(activation_svd, rank=rank, damping=self.method.damping)
            return _mapped(f, self.form.lead)(w, self.gram)
        return _mapped(functools.partial(svd, rank=rank), self.form.lead)(w)

    @functools.cached_property
    def _tails(self) -> np.ndarray:
        """The share of energy beyond each rank, over all matrices."""
        squares = np.square(np.asarray(self._pair.values, np.float64))
        squares = squares.reshape(-1, squares.shape[-1]).sum(0)
        tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        return tails / tails[0] if tails[0] else tails


# --- Convolutions --------------------------------------------------------------------------------


@dataclass
class TuckerCandidate:
    """A convolution that is factorised by Tucker-2.

    Attributes:
        path: Its path.
        leaf: Its array.
        form: Its matrices.
        sites: Where it is contracted.
        method: `Tucker2`.
    """

    path: str
    leaf: Any
    form: Form
    sites: tuple[Site, ...]
    method: Method

    def __post_init__(self) -> None:
        axes, shape = self.sites[0].axes, self.form.shape
        (self._inside,), (self._out,) = axes.contract, axes.output
        self._window = [k for k in self.form.inner if k != self._inside]
        self._channels = shape[self._inside], shape[self._out]
        self._area = math.prod(shape[k] for k in self._window)
        self._matrices = math.prod(shape[k] for k in self.form.lead)

    @property
    def dense(self) -> Rung:
        """The array itself."""
        return Rung((), math.prod(self.form.shape), sum(site.flops for site in self.sites), 0.0)

    def cost(self, ranks: tuple[int, ...]) -> tuple[int, int]:
        """Count the params and the FLOPs at some ranks."""
        (a, b), (inner, outer), area = ranks, self._channels, self._area
        params = self._matrices * (inner * a + area * a * b + b * outer)
        flops = 0
        for site in self.sites:
            before = math.prod(site.activation.shape) // inner * site.repeats
            after = site.flops // (2 * area * inner * outer)
            flops += 2 * (before * inner * a + after * (area * a * b + b * outer))
        return params, flops

    def ladder(self, multiple: int) -> Iterator[tuple[int, ...]]:
        """List ranks from all channels down, each time where less is lost per param saved."""
        ranks = [n // multiple * multiple for n in self._channels]
        while min(ranks) >= multiple and min(ranks) > 0:
            a, b = ranks
            if a <= self._area * b and b <= self._area * a:  # more could not be told apart
                yield a, b
            choices = []
            for side in range(2):
                less = [n - multiple * (k == side) for k, n in enumerate(ranks)]
                if min(less) > 0:
                    lost = self._spectra[side][less[side] : ranks[side]].sum()
                    saved = self.cost((a, b))[0] - self.cost((less[0], less[1]))[0]
                    choices.append((lost / saved, less))
            if not choices:
                return
            _, ranks = min(choices)

    def loss(self, ranks: tuple[int, ...]) -> float:
        """Give what is lost at most, as a share of its energy."""
        total = self._spectra[0].sum()
        lost = sum(s[r:].sum() for s, r in zip(self._spectra, ranks, strict=True))
        return float(min(lost / total, 1.0)) if total else 0.0

    def template(self, ranks: tuple[int, ...]) -> Factors:
        """Give the shapes of its factors."""
        make = functools.partial(_template, self.form, self.leaf.dtype)
        return Factors(
            left=make(axes=[self._inside], ranks=ranks[:1]),
            core=make(axes=self._window, ranks=ranks),
            right=make(axes=[self._out], ranks=ranks[1:]),
        )

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """Compute its factors."""
        assert isinstance(self.method, Tucker2)
        a, b = ranks
        f = functools.partial(tucker2, rank_in=a, rank_out=b, iterations=self.method.iterations)
        parts: Tucker = _mapped(f, self.form.lead)(self._kernels)
        right = jnp.swapaxes(parts.right, -1, -2)
        place = functools.partial(_aligned, self.form)
        factors = Factors(
            left=place(parts.left, [self._inside]),
            core=place(parts.core, self._window),
            right=place(right, [self._out]),
        )
        return jax.tree.map(lambda part: part.astype(self.leaf.dtype), factors)

    @functools.cached_property
    def _kernels(self) -> Array:
        """`(*lead, window, in, out)`."""
        x = jnp.asarray(self.leaf).astype(jnp.float32)
        x = jnp.transpose(x, [*self.form.lead, *self._window, self._inside, self._out])
        lead = [self.form.shape[k] for k in self.form.lead]
        return x.reshape(*lead, self._area, *self._channels)

    @functools.cached_property
    def _spectra(self) -> tuple[np.ndarray, np.ndarray]:
        found = _mapped(spectra, self.form.lead)(self._kernels)
        inputs, outputs = (np.asarray(x, np.float64) for x in found)
        return (
            inputs.reshape(-1, inputs.shape[-1]).sum(0),
            outputs.reshape(-1, outputs.shape[-1]).sum(0),
        )


def errors(candidate: Candidate, factors: Factors) -> tuple[float, float | None]:
    """Measure what factors are off by, relative: in the weights, and in what they give.

    Args:
        candidate: The leaf.
        factors: Its factors.

    Returns:
        `‖W - Ŵ‖ / ‖W‖`, and `‖X (W - Ŵ)‖ / ‖X W‖` where XᵀX was seen (otherwise `None`).
    """
    w = candidate.form.to_matrices(jnp.asarray(candidate.leaf).astype(jnp.float32))
    off = candidate.form.to_matrices(factors.dense().astype(jnp.float32)) - w
    gram = getattr(candidate, "gram", None)
    plain = _ratio(jnp.square(off).sum(), jnp.square(w).sum())
    if gram is None:
        return plain, None
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    power = lambda x: jnp.maximum(exact("...io,...ij,...jo->", x, gram, x), 0)
    return plain, _ratio(power(off), power(w))


def _ratio(error: Array, whole: Array) -> float:
    return float(jnp.sqrt(error / jnp.where(whole > 0, whole, 1)))
