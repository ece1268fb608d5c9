"""Clip search: give up the ends of a slice's range where the outputs gain by it."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float

from jaxcompress import numerics, stats
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.numerics import MSE, Format, QArray, Scaled
from jaxcompress.quantize._method import Method
from jaxcompress.stats import Statistic


@dataclass(frozen=True, kw_only=True)
class ClipSearch(Method):
    """Try a grid of fractions of each slice's range; see `clip_search` for the mathematics.

    Where there are no activations to be seen (`pack`, `fake_quant`), all inputs count alike: that
    is the plain `numerics.MSE` range.

    Attributes:
        range: The grid, and the norm of the error; it stands in for the `range` of the format.

    Raises:
        ArgumentTypeError: If `range` is not a `numerics.MSE`.

    Example:
        >>> from jaxcompress.numerics import PerChannel, int4
        >>> ClipSearch(range=MSE(points=11)).alone(Format(int4, PerChannel())).range.points
        11
    """

    range: MSE = field(default_factory=MSE)

    def __post_init__(self):
        if not isinstance(self.range, MSE):
            raise ArgumentTypeError(
                "range",
                got=repr(self.range),
                expected="a numerics.MSE, which is a grid of fractions",
                fix="For example ClipSearch(range=MSE(lowest=0.5, points=51)).",
            )

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """The norms of the inputs."""
        return {"norms": stats.channel_norm()}

    def alone(self, format: Format) -> Format:
        """Give the format with the grid as its range."""
        return dataclasses.replace(format, range=self.range)

    def __call__(
        self, w: Float[Array, "in out"], format: Format, seen: Mapping[str, Any]
    ) -> tuple[QArray, dict[str, Array]]:
        """Quantize one matrix; see `clip_search`."""
        norms = seen["norms"]
        moments = jnp.square(norms.l2) / jnp.maximum(norms.tokens, 1)
        return clip_search(w, moments, format, range=self.range)


def clip_search(
    w: Float[ArrayLike, "in out"],
    moments: Float[ArrayLike, " in"],
    format: Format,
    *,
    range: MSE | None = None,
) -> tuple[QArray, dict[str, Array]]:
    r"""Round to nearest, with each slice's range cut where the outputs' error is least.

    The error of a slice is $\sum_k \mathrm{E}[x_k^2] \, |w_k - \hat w_k|^p$: for p = 2 the squared
    error of the output if inputs were uncorrelated.

    Args:
        w: Weights, contracted over the first axis; computed in float32.
        moments: $\mathrm{E}[x_k^2]$ of each input, at any scale. In a slice whose inputs were all
            zero, or where moments are not finite, all inputs count alike.
        format: `PerTensor()`, `PerChannel((-1,))` or `PerGroup(size, -2)`, of any type but a
            `Basis`.
        range: The grid and p, in place of the format's own range; `MSE()` by default.

    Returns:
        The stored form, and `{"weighted": whether the moments counted}`.

    Raises:
        ArgumentTypeError: If w is not floating point.
        ArgumentError: If the shapes do not go together, or the type is a `Basis`.

    Example:
        >>> from jaxcompress.numerics import int4
        >>> w = jnp.asarray([[10.0], [3.0], [1.2], [0.8]])
        >>> for moments in ([1.0, 1.0, 1.0, 1.0], [0.01, 1.0, 1.0, 1.0]):
        ...     q, _ = clip_search(w, jnp.asarray(moments), Format(int4))
        ...     print(q.values.ravel().tolist())
        [7, 2, 1, 1]
        [7, 3, 1, 1]

    Reference: Lin et al., "AWQ" (arXiv:2306.00978), whose code clips so, on outputs themselves.
    """
    w, moments = jnp.asarray(w), jnp.asarray(moments)
    if moments.shape != w.shape[:1]:
        raise ArgumentError(
            "moments",
            got=f"shape {moments.shape} for weights of shape {w.shape}",
            expected="(in,) for weights (in, out)",
            fix="Pass the mean square of each input.",
        )
    if not isinstance(format.qtype, Scaled):
        raise ArgumentError(
            "format",
            got=f"{format.qtype.name}, with several scales per slice",
            expected="a type with one scale per slice where a range is cut",
            fix="Take RoundToNearest(), which fits a basis by least squares.",
        )
    numerics.scale_shape(w.shape, format)  # raises where the format does not fit
    return _clip_search(w, moments.astype(jnp.float32), format, range or MSE())


@functools.partial(jax.jit, static_argnums=(2, 3))
def _clip_search(
    weights: Array, moments: Array, format: Format, range: MSE
) -> tuple[QArray, dict[str, Array]]:
    w = weights.astype(jnp.float32)
    usable = jnp.isfinite(moments).all() & (moments > 0).any()
    moments = jnp.where(usable, moments / moments.max(), 1)
    blocked = format.granularity.block(jnp.broadcast_to(moments[:, None], w.shape))
    shared = format.granularity.shared(2)
    blocked = jnp.where(blocked.max(shared, keepdims=True) > 0, blocked, 1)
    overall = numerics.fit_global_scale(w, format)
    scale, zero = range.fit(
        format.granularity.block(w),
        shared=shared,
        format=format,
        global_scale=overall,
        weights=blocked,
    )
    stored = numerics.quantize(w, format, scale=scale, zero=zero, global_scale=overall)
    return dataclasses.replace(stored, dtype=weights.dtype), {"weighted": usable}
