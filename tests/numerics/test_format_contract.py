"""What every number type, granularity and symmetry must do: one contract, one small shape."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import numerics
from jaxcompress.numerics import (
    Basis,
    Codebook,
    Float,
    Format,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    Scaled,
)

INTS = [getattr(numerics, f"int{bits}") for bits in range(2, 9)]
QTYPES = [
    *INTS,
    numerics.uint4,
    numerics.uint8,
    numerics.float4_e2m1fn,
    numerics.float8_e4m3fn,
    numerics.float8_e5m2,
    numerics.nf4,
    numerics.ternary,
    numerics.binary,
    numerics.power_of_two(4),
    numerics.power_of_two(5, terms=2),
    numerics.binary_basis(2),
]
GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(4)]
FORMATS = [Format(qtype, granularity) for qtype in QTYPES for granularity in GRANULARITIES]
FORMATS += [
    Format(qtype, granularity, symmetric=False)
    for qtype in (numerics.int2, numerics.int4, numerics.int8)
    for granularity in GRANULARITIES
]
BLOCKS = {
    name: dataclasses.replace(getattr(numerics, name), granularity=PerGroup(4))
    for name in ("mxfp8", "mxfp8_e5m2", "mxfp4", "mxint8", "nvfp4")
}
FORMATS += BLOCKS.values()
FORMATS += [
    Format(qtype, PerChannel(), scale_dtype=jnp.float8_e4m3fn, global_scale=True, **kwargs)
    for qtype, kwargs in (
        (numerics.int4, {"symmetric": False}),
        (numerics.int4, {"convention": numerics.Convention.SIGNED}),
        (numerics.nf4, {"range": numerics.MSE(points=3)}),
        (numerics.binary, {"range": numerics.LeastSquares(1)}),
        (numerics.binary_basis(2), {}),
    )
]
FORMATS += [Format(numerics.int4, PerGroup(4), scale_dtype=jnp.float8_e4m3fn, symmetric=False)]
by_name = pytest.mark.parametrize(
    "format",
    FORMATS,
    ids=lambda f: (
        f"{f.qtype.name}-{type(f.granularity).__name__}-{f.symmetric}-{f.scale_dtype}"
        + "-global" * f.global_scale
    ),
)
pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(scope="module")
def x():
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    x[0], x[:, 5] = 0, 0  # a zero in every slice, and an all-zero channel
    return jnp.asarray(x)


def levels_of(q):
    """Every number that each slice can hold: scale's shape without sharing, levels at the end."""
    scale = np.asarray(numerics.effective_scale(q), np.float64)
    qtype = q.format.qtype
    if isinstance(qtype, Basis):
        signs = np.array(list(itertools.product((-1, 1), repeat=qtype.bits)))
        return scale @ signs.T
    if isinstance(qtype, Int):
        codes = np.arange(q.format.limits[0], q.format.limits[1] + 1)
    elif isinstance(qtype, Float):
        every = np.arange(2**qtype.bits, dtype=np.uint8).view(qtype.storage).astype(np.float64)
        codes = every[np.isfinite(every)]
    else:
        assert isinstance(qtype, Codebook)
        codes = np.asarray(qtype.levels, np.float32)
    zero = 0.0 if q.zero is None else np.asarray(q.zero, np.float64)[..., None]
    return (codes - zero) * scale[..., None]


@functools.partial(jax.jit, static_argnums=1)
def everything(x, format):
    """All there is to know about a format, in one compilation."""
    q = numerics.quantize(x, format)
    y = numerics.dequantize(q)
    parts = {"scale": q.scale, "zero": q.zero, "global_scale": q.global_scale}
    again = numerics.dequantize(numerics.quantize(y, format, **parts))

    def total(x):
        faked = numerics.fake_quant(x, format)
        return (2 * faked).sum(), faked

    gradient, faked = jax.grad(total, has_aux=True)(x)
    return q, y, again, faked, gradient


@by_name
def test_contract(x, format):
    q, y, again, faked, gradient = everything(x, format)
    assert (q.shape, q.dtype, y.shape, y.dtype) == (x.shape, x.dtype, x.shape, x.dtype)
    assert q.values.dtype == format.qtype.storage
    assert q.scale.shape == numerics.scale_shape(x.shape, format)
    assert q.scale.dtype == format.scale_dtype
    assert (q.zero is None) == format.symmetric
    assert (q.global_scale is not None) == format.global_scale
    if q.global_scale is not None:
        assert q.global_scale.dtype == jnp.float32
        assert q.global_scale.shape == (1,) * q.scale.ndim
    np.testing.assert_array_equal(faked, y)
    np.testing.assert_array_equal(again, y)

    blocked, got = (np.asarray(format.granularity.block(np.asarray(a, float))) for a in (x, y))
    levels = levels_of(q)
    tiny = 1e-6 * np.abs(levels).max()
    assert np.abs(got[..., None] - levels).min(-1).max() <= tiny  # a number that it can hold
    nearest = np.abs(blocked[..., None] - levels).min(-1)
    np.testing.assert_allclose(np.abs(got - blocked), nearest, atol=tiny)
    if not isinstance(format.qtype, Basis) and np.abs(levels).min() == 0:
        assert (np.asarray(y)[np.asarray(x) == 0] == 0).all()
    may_clip = format.scale_dtype != jnp.float32  # where rounding the scale down shows
    if format.symmetric and isinstance(format.qtype, Int) and format.qtype.signed and not may_clip:
        assert (np.abs(got - blocked) <= np.asarray(q.scale) * 0.500001).all()

    # The gradient passes in the rounding cell of any level, and nowhere else.
    ordered = np.sort(levels, -1)
    low = ordered[..., 0] - (ordered[..., 1] - ordered[..., 0]) / 2
    high = ordered[..., -1] + (ordered[..., -1] - ordered[..., -2]) / 2
    inside = format.granularity.unblock((blocked >= low) & (blocked <= high))
    np.testing.assert_array_equal(gradient, np.where(inside, 2.0, 0.0))


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
def test_eager_narrow_input_and_vmap(x, qtype):
    format = Format(qtype, PerGroup(4), scale_dtype=jnp.bfloat16)
    narrow = x.astype(jnp.bfloat16)
    q = numerics.quantize(narrow, format)
    y = numerics.dequantize(q)
    assert q.dtype == y.dtype == q.scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(numerics.fake_quant(narrow, format), y)
    np.testing.assert_array_equal(everything(narrow, format)[3], y)

    stacked = jax.vmap(lambda x: numerics.quantize(x, format))(jnp.stack([narrow, -narrow]))
    assert stacked.shape == (2, 8, 6)
    np.testing.assert_array_equal(numerics.dequantize(stacked)[0], y)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.bfloat16])
def test_dtypes_in_and_out(x, dtype):
    format = Format(numerics.int8, PerChannel(), scale_dtype=dtype)
    q, y, _, faked, gradient = everything(x.astype(dtype), format)
    assert q.dtype == y.dtype == faked.dtype == gradient.dtype == q.scale.dtype == dtype


SCALED = [q for q in QTYPES if isinstance(q, Scaled) and q.name not in ("int3", "int5", "int6")]


@pytest.mark.parametrize("qtype", SCALED, ids=lambda qtype: qtype.name)
def test_stochastic_rounding_is_unbiased_and_takes_neighbours(qtype):
    low, high = qtype.limits
    t = jnp.asarray(np.random.default_rng(1).uniform(low, high, (1, 64)), jnp.float32)
    t = t.at[0, 0].set(high).at[0, 1].set(low)
    format = Format(qtype)
    one = jnp.ones((1, 1))

    @jax.jit
    @jax.vmap
    def draw(key):
        return numerics.dequantize(numerics.quantize(t, format, scale=one, key=key))

    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)), np.float64)
    inside = np.asarray((t >= format.limits[0]) & (t <= format.limits[1]))
    assert ((draws.max(0) >= t) & (draws.min(0) <= t))[inside].all()
    spread = draws.max(0) - draws.min(0)
    error = np.abs(draws.mean(0) - np.asarray(t))
    assert (error <= 5 * spread / 2 / np.sqrt(2000) + 1e-6)[inside].all()
    assert (np.asarray(draws).std(0) == 0)[:, 0].all()  # the largest number is itself, never past


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
def test_extreme_slices(qtype):
    """A slice of zeros, of subnormals, and of numbers near both ends of float32's range."""
    sizes = np.float32([0, 1e-42, 1e-30, 1e30, 3e38, 1])
    x = jnp.asarray(np.outer(np.ones(8), sizes) * np.resize([1, -1, 0.4], (8, 1)), jnp.float32)
    _, y, _, faked, _ = everything(x, Format(qtype, PerChannel()))
    y = np.asarray(y, np.float64)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(faked, y.astype(np.float32))
    for column, size in ((2, 1e-30), (3, 1e30)):  # a slice's size changes nothing but its scale
        np.testing.assert_allclose(y[:, column] / size, y[:, 5], rtol=1e-5, atol=1e-5)
    if qtype not in (numerics.binary,):
        assert (np.abs(y[:, 0]) == 0).all()
    assert (np.abs(y[:, 1]) <= 2e-38).all() or qtype is numerics.binary
    assert (np.abs(y[:, 4]) <= 3.1e38).all()
