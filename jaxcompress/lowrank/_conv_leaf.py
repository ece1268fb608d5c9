"""A convolution that is factorised by Tucker-2."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.linalg import vmap_leading
from jaxcompress.lowrank._candidate import Candidate, align, template
from jaxcompress.lowrank._factors import Factors
from jaxcompress.lowrank._methods import Tucker2
from jaxcompress.lowrank._tucker import Tucker, spectra, tucker2


@dataclass
class TuckerCandidate(Candidate):
    """A convolution that is factorised by Tucker-2."""

    def __post_init__(self) -> None:
        axes, shape = self.sites[0].axes, self.form.shape
        (self._inside,), (self._out,) = axes.contract, axes.output
        self._window = [k for k in self.form.inner if k != self._inside]
        self._channels = shape[self._inside], shape[self._out]
        self._area = math.prod(shape[k] for k in self._window)
        self._matrices = math.prod(shape[k] for k in self.form.lead)

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
        make = functools.partial(template, self.form, self.leaf.dtype)
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
        parts: Tucker = vmap_leading(f, len(self.form.lead))(self._kernels)
        right = jnp.swapaxes(parts.right, -1, -2)
        place = functools.partial(align, self.form)
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
        found = vmap_leading(spectra, len(self.form.lead))(self._kernels)
        inputs, outputs = (np.asarray(x, np.float64) for x in found)
        return (
            inputs.reshape(-1, inputs.shape[-1]).sum(0),
            outputs.reshape(-1, outputs.shape[-1]).sum(0),
        )
