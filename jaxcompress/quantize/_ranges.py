"""Static ranges of activations: what to watch, and the scale that follows."""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics, stats
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.sites import Form
from jaxcompress.numerics import MSE, AbsMax, Activation, Entropy, Format, Int, Percentile

_BINS = 2048


def statistic(format: Format) -> stats.Statistic:
    """Give what a format's range method has to see: extremes, or a histogram.

    Raises:
        ArgumentError: If it is no method for ranges over batches.
    """
    if isinstance(format.range, AbsMax):
        return stats.min_max(per_tensor=True, reads="channels")
    searched = isinstance(format.range, MSE | Entropy) and isinstance(format.qtype, Int)
    if searched or isinstance(format.range, Percentile):
        return stats.histogram(bins=_BINS, reads="channels")
    raise ArgumentError(
        "activations",
        got=f"{format.range} for static {format.qtype.name} activations",
        expected="AbsMax(), Percentile(p), or for integers MSE() or Entropy()",
        fix="AbsMax() is the default.",
    )


def extremes(result: Any, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Find the range to keep from what was seen.

    Args:
        result: The statistic's result, with any leading axes.
        format: The format of the activations.

    Returns:
        Its ends, with the same leading axes.
    """
    range, qtype = format.range, format.qtype
    # An unsigned symmetric type holds one side of zero.
    symmetric = format.symmetric and not (isinstance(qtype, Int) and not qtype.signed)
    if isinstance(range, Percentile):
        low, high = result.percentile_range(range.percent, symmetric=symmetric)
    elif isinstance(range, MSE):
        low, high = result.mse_range(qtype.bits, symmetric=symmetric)
    elif isinstance(range, Entropy):
        low, high = result.entropy_range(qtype.bits, symmetric=symmetric)
    else:
        low, high = result.low, result.high
    return np.asarray(low), np.asarray(high)


class Ranges:
    """The ranges of the activations that one leaf meets, layer by layer.

    Args:
        path: The leaf's path.
        form: The leaf's form.
        format: The format of the activations.
        apart: The leaf's axes that tell layers apart.
    """

    def __init__(self, path: str, form: Form, format: Format, apart: Collection[int]):
        self._path, self._form, self._format = path, form, format
        shape = [n if k in apart else 1 for k, n in enumerate(form.shape)]
        self._low, self._high = np.full(shape, np.inf), np.full(shape, -np.inf)

    def add(self, result: Any, axes: tuple[int | None, ...], index: dict[int, int]) -> None:
        """Take in what was seen at a site.

        Args:
            result: The statistic's result.
            axes: For each of its leading axes that scans made, the leaf's axis, or `None`.
            index: `{axis of the leaf: index}` of the slice that was seen; empty for all.
        """
        low, high = extremes(result, self._format)
        loose = tuple(k for k in range(low.ndim) if k >= len(axes) or axes[k] is None)
        low, high = low.min(loose), high.max(loose)
        kept = [axis for axis in axes if axis is not None]
        shape = [self._form.shape[k] if k in kept else 1 for k in range(len(self._form.shape))]
        order = np.argsort(kept)
        low, high = (np.transpose(x, order).reshape(shape) for x in (low, high))
        where = tuple(
            slice(index[k], index[k] + 1) if k in index else slice(None)
            for k in range(len(self._form.shape))
        )
        self._low[where] = np.minimum(self._low[where], low)
        self._high[where] = np.maximum(self._high[where], high)

    def settle(self) -> Activation:
        """Turn the ranges into scales.

        Returns:
            The static activation; scale and zero point have as many axes as the leaf.

        Raises:
            ArgumentError: If nothing, or nothing but zeros, was seen.
        """
        if not (np.isfinite(self._low) & np.isfinite(self._high)).all():
            raise self._nothing("no activation at all")
        if ((self._low == 0) & (self._high == 0)).any():
            raise self._nothing("nothing but zeros")
        low, high = jnp.float32(self._low), jnp.float32(self._high)
        scale, zero = numerics.scale_of_range(low, high, self._format)
        return Activation(format=self._format, scale=scale, zero=zero)

    def _nothing(self, what: str) -> ArgumentError:
        return ArgumentError(
            "batches",
            got=f"{what} at the sites of {self._path!r}",
            expected="activations that show their range",
            fix="Calibrate on representative inputs, or make the rule dynamic (static=False).",
        )
