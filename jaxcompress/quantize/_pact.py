"""PACT: a learned clipping level for activations."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError
from jaxcompress.numerics import Activation, Format
from jaxcompress.quantize._quantizer import (
    Learned,
    Quantizer,
    SeenRange,
    from_zero_to,
    positive,
    require_unsigned,
)


@dataclass(frozen=True)
class PACT(Quantizer):
    """Learn where activations are clipped, `alpha`; see `numerics.pact`.

    The codes cover [0, alpha]: an unsigned symmetric format, or an asymmetric one. The paper adds
    an L2 penalty on alpha to the loss; that is `optax.add_decayed_weights` for the label
    "learned" of `quantize.labels`.

    Attributes:
        alpha: Where to start; `None` is the largest entry in the first batch.

    Raises:
        ArgumentError: If alpha is not positive.

    Reference: Choi et al., "PACT: Parameterized Clipping Activation" (arXiv:1805.06085).
    """

    alpha: float | None = None

    def __post_init__(self):
        if self.alpha is not None and not self.alpha > 0:
            raise ArgumentError(
                "alpha",
                got=self.alpha,
                expected="a positive clipping level, or None",
                fix="None takes the largest activation of the first batch.",
            )

    def check(self, format: Format, *, of: str) -> None:
        """Accept activations in integers whose codes all can be non-negative."""
        if of == "weights":
            raise ArgumentError(
                "weights",
                got="PACT()",
                expected="a quantizer for weights: PACT clips activations at zero",
                fix="For example weights=STE(), activations=PACT().",
            )
        require_unsigned(format, "PACT()")

    def learns(self, *, of: str) -> bool:
        """The clipping level of activations."""
        return of == "activations"

    def init_activations(self, seen: SeenRange, format: Format) -> Learned:
        """Start at `alpha`, or clip nothing."""
        if self.alpha is not None:
            return {"alpha": jnp.full_like(seen.high, self.alpha)}
        return {"alpha": jnp.where(seen.high > 0, seen.high, 1)}

    def settle(self, learned: Learned, format: Format) -> Activation:
        """Spread the codes evenly from 0 to alpha."""
        return from_zero_to(positive(learned["alpha"], format), format)

    def surrogate(self, x: Array, learned: Learned, format: Format) -> Array:
        """Clip and round; see `numerics.pact`."""
        return numerics.pact(x, positive(learned["alpha"], format), bits=format.qtype.bits)
