"""How arrays are rounded in training, and what of that is learned: the contract, and the plainest.

A quantizer says four things about a weight leaf (what it accepts, what it learns and from where
it starts, the rounded leaf with its gradients, the stored form) and the same about activations.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError
from jaxcompress.numerics import Activation, Format, Int, PerTensor, QArray
from jaxcompress.quantize._activations import fit_activation, round_through

Learned: TypeAlias = Mapping[str, Array]
"""What a quantizer learns for one leaf, by the paper's name for it."""


class SeenRange(NamedTuple):
    """What a first batch showed of an activation; float32, one entry per stacked layer.

    Attributes:
        low: The smallest entry.
        high: The largest entry.
        mean: The mean magnitude.
    """

    low: Array
    high: Array
    mean: Array


@dataclass(frozen=True)
class Quantizer(abc.ABC):
    """How weights and activations are rounded in training: the base class of `STE`, `LSQ`, ...

    Those that learn a range for activations have one per leaf whose sites they meet, and per
    stacked layer: it takes a format with `PerTensor()`.
    """

    @abc.abstractmethod
    def check(self, format: Format, *, of: str) -> None:
        """Refuse a format that the method is not defined for.

        Args:
            format: The format.
            of: "weights" or "activations".

        Raises:
            ArgumentError: If it is not, or the method does not round such arrays.
        """

    def learns(self, *, of: str) -> bool:
        """Tell whether there is anything to learn.

        Args:
            of: "weights" or "activations".

        Returns:
            Whether there is.
        """
        return False

    def init_weights(self, w: Array, format: Format) -> Learned:
        """Start from the weights.

        Args:
            w: A leaf.
            format: Its format.

        Returns:
            What is learned, of shapes that belong to the leaf's axes.
        """
        return {}

    def weights(self, w: Array, learned: Learned, format: Format) -> Array:
        """Round a leaf, with the gradients of the paper.

        Args:
            w: The leaf.
            learned: What `init_weights` gave, as trained since.
            format: Its format.

        Returns:
            An array of the leaf's shape and dtype.
        """
        return numerics.fake_quant(w, format)

    def pack(self, w: Array, learned: Learned, format: Format) -> QArray:
        """Bring a leaf into the stored form of what `weights` gives.

        Args:
            w: The leaf.
            learned: What was learned.
            format: Its format.

        Returns:
            The stored form.
        """
        return numerics.quantize(w, format)

    def init_activations(self, seen: SeenRange, format: Format) -> Learned:
        """Start from a first batch.

        Args:
            seen: What it showed.
            format: The format of activations.

        Returns:
            What is learned, of the shape of `seen`.
        """
        return {}

    def settle(self, learned: Learned, format: Format) -> Activation | None:
        """Say how integers reproduce the rounding.

        Args:
            learned: What was learned, of any shape.
            format: The format of activations.

        Returns:
            The static form, its scale and zero point of that shape; `None` where the range is
            found or observed, not learned.
        """
        return None

    def surrogate(self, x: Array, learned: Learned, format: Format) -> Array:
        """Round an activation by the paper's formula: its gradients are those of training.

        Args:
            x: The activation.
            learned: Scalars.
            format: The format of activations.

        Returns:
            An array of x's shape and dtype.
        """
        raise AssertionError("only for quantizers that settle")

    def activations(self, x: Array, learned: Learned, format: Format) -> Array:
        """Round an activation to what integers give, bit for bit, with the paper's gradients.

        Args:
            x: The activation.
            learned: Scalars.
            format: The format of activations.

        Returns:
            An array of x's shape and dtype.
        """
        settled = jax.tree.map(jax.lax.stop_gradient, self.settle(learned, format))
        scale, zero = fit_activation(x, settled, tuple(range(x.ndim)))
        exact = round_through(jax.lax.stop_gradient(x), scale, zero, settled)
        return numerics.pass_through(self.surrogate(x, learned, format), exact)


@dataclass(frozen=True)
class STE(Quantizer):
    """Round to the format, with gradient 1 where nothing is clipped; nothing is learned.

    Ranges of weights follow the weights. Those of activations are found in each call, or, by
    `Rule(static=True)`, followed by observers. Any format; see `numerics.fake_quant`.

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons"
    (arXiv:1308.3432).
    """

    def check(self, format: Format, *, of: str) -> None:
        """Accept every format."""


# --- What the papers' quantizers share ---------------------------------------------------------


def limits_of(format: Format) -> tuple[float, float]:
    assert format.limits is not None
    return format.limits


def from_zero_to(top: Array, format: Format) -> Activation:
    """Make the static form whose codes cover [0, top]."""
    least, most = limits_of(format)
    scale = top * np.float32(1 / (most - least))
    zero = None if format.symmetric else jnp.full_like(scale, least)
    return Activation(format=format, scale=scale, zero=zero)


def positive(learned: Array, format: Format) -> Array:
    """Keep a step or level positive: one that training drove to zero can still come back."""
    # Not so small that the square of its reciprocal, in the gradient, is infinite.
    least = max(2.0**-40, float(jnp.finfo(format.scale_dtype).smallest_normal))
    return numerics.pass_through(learned, jnp.maximum(jax.lax.stop_gradient(learned), least))


def require(fits: bool, format: Format, *, of: str, method: str, expected: str) -> None:
    if not fits:
        raise ArgumentError(
            of,
            got=f"{method} with {format.qtype.name}, symmetric={format.symmetric}",
            expected=f"{expected} where {method} rounds {of}",
            fix="Change the policy's format, or use STE(), which takes all.",
        )


def require_one_range(format: Format, of: str, method: str) -> None:
    if of == "activations" and not isinstance(format.granularity, PerTensor):
        raise ArgumentError(
            of,
            got=f"{method} with {format.granularity}",
            expected="PerTensor() where the range of activations is learned",
            fix="Tokens that have not come yet have no range to learn.",
        )


def require_unsigned(format: Format, method: str) -> None:
    is_int = isinstance(format.qtype, Int)
    require(
        is_int and not (format.symmetric and getattr(format.qtype, "signed", True)),
        format,
        of="activations",
        method=method,
        expected="an unsigned or an asymmetric integer format",
    )
    require_one_range(format, "activations", method)
