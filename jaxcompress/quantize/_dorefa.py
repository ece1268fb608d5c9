"""DoReFa: weights squeezed by tanh, activations clipped to [0, 1]."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array

from jaxcompress import numerics
from jaxcompress.numerics import AbsMax, Activation, Codebook, Format, Int, QArray, binary
from jaxcompress.quantize._quantizer import (
    Learned,
    Quantizer,
    from_zero_to,
    require,
    require_unsigned,
)


@dataclass(frozen=True)
class DoReFa(Quantizer):
    r"""Squeeze weights into [-1, 1] by tanh, clip activations to [0, 1]; nothing is learned.

    See `numerics.dorefa_weights` and `numerics.dorefa_activations`. Weights: integer formats,
    whose bits and granularity alone count (maxima are taken per slice), and `binary`.
    Activations: as `PACT`.

    The levels of weights are $2q / (2^k - 1) - 1$: an even number of them, none of which is 0.
    Pruned entries do not stay 0 therefore, and the stored form is a `Codebook` of these levels.

    Reference: Zhou et al., "DoReFa-Net" (arXiv:1606.06160), sections 2.3 and 2.4.
    """

    def check(self, format: Format, *, of: str) -> None:
        """Accept integer formats, and `binary` for weights."""
        if of == "activations":
            return require_unsigned(format, "DoReFa()")
        is_fit = isinstance(format.qtype, Int) or format.qtype == binary
        return require(
            is_fit, format, of=of, method="DoReFa()", expected="an integer format, or binary"
        )

    def weights(self, w: Array, learned: Learned, format: Format) -> Array:
        """Squeeze and round; see `numerics.dorefa_weights`."""
        blocked, shared = format.granularity.block(w), format.granularity.shared(w.ndim)
        rounded = numerics.dorefa_weights(blocked, bits=format.qtype.bits, axes=shared)
        return format.granularity.unblock(rounded)

    def pack(self, w: Array, learned: Learned, format: Format) -> QArray:
        """Store indices of the levels."""
        wide = w.astype(jnp.float32)
        scale = jnp.ones(numerics.scale_shape(w.shape, format), jnp.float32)
        if format.qtype == binary:
            shared = format.granularity.shared(w.ndim)
            scale = jnp.abs(format.granularity.block(wide)).mean(shared, keepdims=True)
        else:
            bits, steps = format.qtype.bits, 2**format.qtype.bits - 1
            levels = tuple((2 * q - steps) / steps for q in range(steps + 1))
            levels = Codebook(name=f"dorefa{bits}", bits=bits, levels=levels)
            format = replace(format, qtype=levels, symmetric=True, convention=None, range=AbsMax())
        rounded = self.weights(wide, learned, format)
        return replace(numerics.quantize(rounded, format, scale=scale), dtype=w.dtype)

    def settle(self, learned: Learned, format: Format) -> Activation:
        """Spread the codes evenly from 0 to 1."""
        return from_zero_to(jnp.ones((), jnp.float32), format)

    def surrogate(self, x: Array, learned: Learned, format: Format) -> Array:
        """Clip and round; see `numerics.dorefa_activations`."""
        return numerics.dorefa_activations(x, bits=format.qtype.bits)
