"""A contraction of rounded numbers, and the check of what its kernel computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics, quantize
from jaxcompress.numerics import (
    Activation,
    Format,
    PerChannel,
    PerTensor,
    PerToken,
    int8,
    uint8,
)

TOKEN = Format(int8, PerToken())
ASYMMETRIC = Format(int8, PerToken(), symmetric=False)
UNSIGNED = Format(uint8, PerTensor(), symmetric=False)
ACTS = {"floats": None, "symmetric": TOKEN, "asymmetric": ASYMMETRIC, "unsigned": UNSIGNED}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A contraction of an activation with weights.

    Attributes:
        run: `(weights, x, *others) -> result`.
        weights: Their shape.
        format: Their format.
        x: The activation's shape.
        kept: Its axes with a scale of their own under `PerToken()`.
        act: Its format, or `None`.
        static: The range that static activations have, or `None`.
        dtype: Its dtype.
        others: Further operands.
        kernel: What is to run.
    """

    run: object
    weights: tuple[int, ...]
    format: Format
    x: tuple[int, ...]
    kept: tuple[int, ...] = ()
    act: Format | None = None
    static: tuple[float, float] | None = None
    dtype: object = jnp.float32
    others: tuple = ()
    kernel: str

    def quantized(self, w):
        """The stored form of weights, with the activation's format."""
        q = numerics.quantize(w.astype(self.dtype), self.format)
        if self.act is None:
            return q
        scale = zero = None
        if self.static is not None:
            ends = (jnp.full((1,) * w.ndim, end, jnp.float32) for end in self.static)
            scale, zero = numerics.scale_of_range(*ends, self.act)
        activation = Activation(format=self.act, scale=scale, zero=zero)
        return dataclasses.replace(q, activation=activation)

    def rounded(self, q, x):
        """What the codes of an activation stand for, by the rounding of single arrays."""
        x = x.astype(self.dtype).astype(jnp.float32)
        if self.act is None:
            return x
        if self.static is not None:
            parts = q.activation.scale, q.activation.zero
            s, z = (jnp.zeros(()) if p is None else p.reshape(()) for p in parts)
            low, high = self.act.limits
            return (jnp.clip(jnp.round(x / s) + z, low, high) - z) * s
        tokens = isinstance(self.act.granularity, PerToken) and self.kept
        granularity = PerChannel(self.kept) if tokens else PerTensor()
        return numerics.fake_quant(x, dataclasses.replace(self.act, granularity=granularity))


def draw(*shape, mean=0.0):
    rng = np.random.default_rng(sum(shape))
    spread = rng.uniform(0.5, 2, shape[-1])  # so that it matters which scale is taken
    return jnp.asarray((rng.normal(mean, 1, shape) * spread), jnp.float32)


def check(cases, *, backend=None, tolerance=1e-5):
    """Every case's result, and the name of its kernel, in one compiled function."""
    weights = {case.weights: draw(*case.weights) for case in cases.values()}
    inputs = {case.x: draw(*case.x, mean=0.3) for case in cases.values()}

    def quantized(weights):
        made, params = {}, {}  # alike cases share their weights
        for name, case in cases.items():
            key = case.weights, case.format, case.act, case.static, case.dtype
            if key not in made:
                made[key] = case.quantized(weights[case.weights])
            params[name] = made[key]
        return params

    def fn(params, inputs):
        return {
            name: case.run(params[name], inputs[case.x].astype(case.dtype), *case.others)
            for name, case in cases.items()
        }

    def both(weights, inputs):
        params, wide = quantized(weights), {}
        for name, case in cases.items():
            w = numerics.dequantize(dataclasses.replace(params[name], dtype=jnp.dtype("float32")))
            wide[name] = case.run(w, case.rounded(params[name], inputs[case.x]), *case.others)
        return quantize.execute(fn, backend=backend)(params, inputs), wide

    got, wide = jax.device_get(jax.jit(both)(weights, inputs))
    params = jax.eval_shape(quantized, weights)
    chosen = {u.path: u.kernel for u in quantize.site_kernels(fn, params, inputs, backend=backend)}
    assert chosen == {name: case.kernel for name, case in cases.items()}
    for name, case in cases.items():
        assert got[name].shape == wide[name].shape and got[name].dtype == case.dtype, name
        off = np.abs(got[name].astype(np.float64) - wide[name]).max() / np.abs(wide[name]).max()
        assert off < (2**-7 if case.dtype == jnp.bfloat16 else tolerance), f"{name}: {off}"


def nhwc(w, x, strides=(1, 1), padding="SAME", numbers=("NHWC", "HWIO", "NHWC"), **options):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, **options
    )


# name -> (weights, x, convolution, axis of the examples, axis of the outputs)
