"""LSQ and LSQ+: learned step sizes and offsets."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress import numerics
from jaxcompress.numerics import Activation, Format, Int, QArray
from jaxcompress.quantize._quantizer import (
    Learned,
    Quantizer,
    SeenRange,
    limits_of,
    positive,
    require,
    require_one_range,
)


@dataclass(frozen=True)
class LSQ(Quantizer):
    r"""Learn the step sizes of weights and activations; see `numerics.lsq`.

    Learns `step` per scale of a leaf, and one per activation, from $2 \, mean|x| / \sqrt{Q_P}$.
    Symmetric integer formats; unsigned ones suit activations after a ReLU.

    Reference: Esser et al., "Learned Step Size Quantization" (arXiv:1902.08153). N, in the scale
    of an activation step's gradient, counts the examples of the batch too.
    """

    def check(self, format: Format, *, of: str) -> None:
        """Accept symmetric integer formats."""
        _require_integers(format, of, "LSQ()", symmetric=True)

    def learns(self, *, of: str) -> bool:
        """Steps, for both."""
        return True

    def init_weights(self, w: Array, format: Format) -> Learned:
        """Take the paper's first step from the weights; see `numerics.lsq_init`."""
        return {"step": numerics.lsq_init(w, format)}

    def weights(self, w: Array, learned: Learned, format: Format) -> Array:
        """Round by the step; see `numerics.lsq`."""
        return numerics.lsq(w, positive(learned["step"], format), format)

    def pack(self, w: Array, learned: Learned, format: Format) -> QArray:
        """Store the codes of the learned step."""
        return numerics.quantize(w, format, scale=positive(learned["step"], format))

    def init_activations(self, seen: SeenRange, format: Format) -> Learned:
        """Take the paper's first step from the mean magnitude."""
        _, high = limits_of(format)
        return {"step": jnp.where(seen.mean > 0, seen.mean * np.float32(2 / np.sqrt(high)), 1)}

    def settle(self, learned: Learned, format: Format) -> Activation:
        """Scale by the step."""
        return Activation(format=format, scale=positive(learned["step"], format))

    def surrogate(self, x: Array, learned: Learned, format: Format) -> Array:
        """Round by the step; see `numerics.lsq`."""
        step = positive(learned["step"], format).reshape((1,) * x.ndim)
        return numerics.lsq(x, step, format)


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """Learn step sizes, and for activations offsets too; see `numerics.lsq_plus`.

    Weights: symmetric integer formats, `step` from max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1),
    otherwise as in `LSQ`. Activations: asymmetric integer formats, `step` and `offset` from the
    range of the first batch, zero included.

    Integers have the offset only as a whole zero point. So the forward pass takes the offset to
    the nearest multiple of the step that leaves a code for 0, and the gradient passes to it as if
    it did not: what is trained is what is executed, and zero (padding, pruned entries) is exact.

    Attributes:
        whole: Take the offset so. `False` is the paper's form, in which 0 has no code; converting
            such params rounds the offset then, and they agree to half a step only.

    Reference: Bhalgat et al., "LSQ+" (arXiv:2004.09576), equations 1 to 7, sections 3.1 and 3.2.
    """

    whole: bool = True

    def check(self, format: Format, *, of: str) -> None:
        """Accept symmetric integer formats for weights, asymmetric ones for activations."""
        _require_integers(format, of, "LSQPlus()", symmetric=of == "weights")

    def init_weights(self, w: Array, format: Format) -> Learned:
        """Cover three standard deviations."""
        shared = format.granularity.shared(w.ndim)
        blocked = format.granularity.block(w.astype(jnp.float32))
        mean, spread = blocked.mean(shared, keepdims=True), 3 * blocked.std(shared, keepdims=True)
        reach = jnp.maximum(jnp.abs(mean - spread), jnp.abs(mean + spread))
        half = np.float32(2.0 ** (1 - format.qtype.bits))
        return {"step": jnp.where(reach > 0, reach * half, 1)}

    def init_activations(self, seen: SeenRange, format: Format) -> Learned:
        """Cover the first batch; see `numerics.lsq_plus_init`."""
        low, high = seen.low, seen.high
        if self.whole:
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        least, most = limits_of(format)
        step = jnp.where(high > low, (high - low) * np.float32(1 / (most - least)), 1)
        return {"step": step, "offset": low - least * step}

    def settle(self, learned: Learned, format: Format) -> Activation:
        """Scale by the step, and put the zero point nearest to the offset."""
        least, most = limits_of(format)
        step = positive(learned["step"], format)
        zero = jnp.clip(jnp.round(-learned["offset"] / step), least, most)
        return Activation(format=format, scale=step, zero=zero)

    def surrogate(self, x: Array, learned: Learned, format: Format) -> Array:
        """Round by step and offset; see `numerics.lsq_plus`."""
        step, offset = positive(learned["step"], format), learned["offset"]
        if self.whole:
            form = jax.tree.map(jax.lax.stop_gradient, self.settle(learned, format))
            offset = numerics.pass_through(offset, -form.zero * form.scale)
        ones = (1,) * x.ndim
        return numerics.lsq_plus(x, step.reshape(ones), offset.reshape(ones), format)

    def activations(self, x: Array, learned: Learned, format: Format) -> Array:
        """Round as integers do, or by the paper's formula; see the class."""
        if not self.whole:
            return self.surrogate(x, learned, format)
        return super().activations(x, learned, format)


def _require_integers(format: Format, of: str, method: str, *, symmetric: bool) -> None:
    require(
        isinstance(format.qtype, Int) and format.symmetric == symmetric,
        format,
        of=of,
        method=method,
        expected=f"{'a symmetric' if symmetric else 'an asymmetric'} integer format",
    )
    require_one_range(format, of, method)
