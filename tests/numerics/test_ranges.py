"""Range methods and conventions against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError
from jaxcompress.numerics import (
    MSE,
    AbsMax,
    Convention,
    Format,
    LeastSquares,
    Percentile,
    PerChannel,
    PerTensor,
    int4,
    int8,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")
X = np.random.default_rng(0).standard_t(3, size=(48, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("convention", "codes"),
    [
        (Convention.NARROW, [-6, 0, 7]),  # 7 -> 7
        (Convention.HALF, [-6, 0, 7]),  # 7 -> 7.5, clipped
        (Convention.TIGHT, [-6, 0, 7]),
        (Convention.SIGNED, [7, 0, -8]),  # 7 -> -8, scale negative
    ],
)
def test_conventions(convention, codes):
    x = jnp.asarray([-6.0, 0.0, 7.0])
    q = numerics.quantize(x, Format(int4, convention=convention))
    scale = {"NARROW": 1.0, "HALF": 7 / 7.5, "TIGHT": 1.0, "SIGNED": -7 / 8}[convention.name]
    np.testing.assert_allclose(q.scale, [scale], rtol=1e-6)
    assert q.values.tolist() == codes
    # All conventions agree on their limits: only NARROW leaves -8 unused.
    mirrored = numerics.quantize(-x, Format(int4, convention=convention))
    low = {"NARROW": -7, "HALF": -8, "TIGHT": -8, "SIGNED": -8}[convention.name]
    assert mirrored.values.min() == low


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.9, 100.0])
def test_percentile_is_the_inverted_cdf(percent):
    q = numerics.quantize(jnp.asarray(X), Format(int8, PerChannel(), range=Percentile(percent)))
    cut = np.percentile(np.abs(X), percent, axis=0, keepdims=True, method="inverted_cdf")
    np.testing.assert_allclose(q.scale, cut / 127, rtol=1e-6)


def test_percentile_does_not_lose_a_sparse_slice():
    x = jnp.zeros((50, 1)).at[3].set(2.0)
    y = numerics.fake_quant(x, Format(int8, range=Percentile(50.0)))
    np.testing.assert_allclose(y, x, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_mse_is_the_best_of_its_grid(symmetric, norm):
    points = 9
    search = MSE(lowest=0.2, points=points, norm=norm)
    format = Format(int4, PerChannel(), symmetric=symmetric, range=search)
    y = np.asarray(numerics.fake_quant(jnp.asarray(X), format))
    errors = []
    for fraction in np.linspace(1, 0.2, points, dtype=np.float32):
        if symmetric:
            scale, zero, low = np.abs(X).max(0) * fraction / 7, 0, -7
        else:
            top, bottom = np.maximum(X.max(0), 0) * fraction, np.minimum(X.min(0), 0) * fraction
            scale, low = (top - bottom) / 15, -8
            zero = np.round(-bottom / scale) - 8
        hat = (np.clip(np.round(X / scale) + zero, low, 7) - zero) * scale
        errors.append((np.abs(hat - X) ** norm).sum(0))
    np.testing.assert_allclose((np.abs(y - X) ** norm).sum(0), np.min(errors, 0), rtol=1e-3)
    assert (np.argmin(errors, 0) > 0).any()  # heavy tails: some slice is better clipped


@pytest.mark.parametrize("qtype", [numerics.ternary, numerics.int2, numerics.nf4], ids=str)
def test_least_squares_is_no_worse_than_mse(qtype):
    x = jnp.asarray(X)
    errors = {
        type(method): np.square(
            numerics.fake_quant(x, Format(qtype, PerChannel(), range=method)) - X
        ).sum(0)
        for method in (AbsMax(), MSE(), LeastSquares(3))
    }
    assert (errors[LeastSquares] <= errors[MSE] * (1 + 1e-5)).all()
    assert (errors[MSE] <= errors[AbsMax] * (1 + 1e-5)).all()


def test_binary_least_squares_is_the_mean_magnitude():
    format = Format(numerics.binary, PerChannel(), range=LeastSquares(1))
    q = numerics.quantize(jnp.asarray(X), format)
    np.testing.assert_allclose(q.scale, np.abs(X).mean(0, keepdims=True), rtol=1e-5)


def test_ternary_beats_the_threshold_rule_of_twn():
    x = np.random.default_rng(1).normal(size=(400, 3)).astype(np.float32)
    threshold = 0.7 * np.abs(x).mean(0)  # Li et al., arXiv:1605.04711, equation 6
    kept = np.abs(x) > threshold
    twn = kept * np.sign(x) * (np.abs(x) * kept).sum(0) / kept.sum(0)
    ours = numerics.fake_quant(
        jnp.asarray(x), Format(numerics.ternary, PerChannel(), range=LeastSquares())
    )
    assert (np.square(ours - x).sum(0) <= np.square(twn - x).sum(0) * 1.001).all()


@given(
    x=hnp.arrays(np.float32, (6,), elements=st.floats(-1e6, 1e6, width=32)),
    symmetric=st.booleans(),
)
def test_zero_is_exact_and_the_error_at_most_half_a_step(x, symmetric):
    format = Format(int4, PerTensor(), symmetric=symmetric)
    q = numerics.quantize(jnp.asarray(np.append(x, np.float32(0))), format)
    y = np.asarray(numerics.dequantize(q))
    assert y[-1] == 0
    # The rounded zero point may push an end of the range out by half a step more.
    slack = 0.500001 if symmetric else 1.000001
    assert (np.abs(y[:-1] - x) <= slack * float(q.scale[0]) + 1e-37).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_are_computed_with_the_scale_as_stored(dtype):
    format = Format(int8, PerChannel(), scale_dtype=dtype)
    q = jax.jit(lambda x: numerics.quantize(x, format))(jnp.asarray(X))
    assert q.scale.dtype == dtype
    scale = np.asarray(q.scale, np.float32)
    np.testing.assert_array_equal(q.values, np.clip(np.round(X * (1 / scale)), -127, 127))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Percentile(0.0),
        lambda: Percentile(101.0),
        lambda: MSE(lowest=0.0),
        lambda: MSE(points=1),
        lambda: LeastSquares(0),
        lambda: numerics.PerGroup(0),
        lambda: numerics.PerGroup(None),
        lambda: PerChannel(()),
        lambda: PerChannel((0, 0)),
        lambda: Format(numerics.nf4, symmetric=False),
        lambda: Format(numerics.nf4, convention=Convention.HALF),
        lambda: Format(int8, symmetric=False, convention=Convention.HALF),
        lambda: Format(int8, scale_dtype=jnp.int32),
        lambda: Format(numerics.binary_basis(2), range=MSE()),
    ],
)
def test_impossible_formats_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_formats_compare_and_hash_by_value():
    assert Format(int8) == Format(int8, PerTensor(), range=AbsMax(), convention=Convention.NARROW)
    assert len({Format(int8), Format(int8), Format(int8, PerChannel())}) == 2


def test_a_percentile_counts_exactly():
    x = jnp.arange(1.0, 1001.0)
    q = numerics.quantize(x, numerics.Format(numerics.int8, range=numerics.Percentile(99.9)))
    assert float(q.scale.squeeze()) == pytest.approx(999 / 127)
