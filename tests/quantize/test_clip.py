"""Clip search against a NumPy grid, and bias correction against measured means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import errors, numerics, quantize, stats
from jaxcompress.numerics import MSE, Format, PerChannel, PerGroup, PerTensor, binary_basis, int4

pytestmark = pytest.mark.usefixtures("strict_promotion")

IN, OUT = 16, 6
GRID = MSE(lowest=0.3, points=15)


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(0).standard_t(3, (IN, OUT)).astype(np.float32)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(1)
    return (rng.standard_normal((50, IN)) * 4.0 ** rng.uniform(-2, 2, IN)).astype(np.float32)


def best_scales(w, moments, size, axis=0):
    """Try every fraction of every group's largest magnitude."""
    scales = []
    for start in range(0, len(w), size):
        rows, weights = w[start : start + size], moments[start : start + size, None]
        peak = np.abs(rows).max(axis, keepdims=True)
        best = np.full(peak.shape, np.inf)
        scale = peak / 7
        for fraction in np.linspace(1, GRID.lowest, GRID.points, dtype=np.float32):
            step = fraction * peak / 7
            off = rows - np.clip(np.round(rows / step), -7, 7) * step
            error = (weights * off**2).sum(axis, keepdims=True)
            scale, best = np.where(error < best, step, scale), np.minimum(error, best)
        scales.append(scale)
    return np.stack(scales)


@pytest.mark.parametrize(
    ("granularity", "size", "axis"),
    [(PerChannel(), IN, 0), (PerGroup(8), 8, 0), (PerTensor(), IN, None)],
)
def test_scales_are_the_best_of_the_grid(w, x, granularity, size, axis):
    moments = np.square(x).mean(0)
    format = Format(int4, granularity)
    q, info = quantize.clip_search(w, moments, format, range=GRID)
    scales = best_scales(w, moments, size, axis)
    np.testing.assert_allclose(q.scale.reshape(scales.shape), scales, rtol=1e-5)
    plain = numerics.quantize(w, format, scale=q.scale)
    np.testing.assert_array_equal(q.values, plain.values)
    assert bool(info["weighted"]) and q.format == format
    assert not np.allclose(
        q.scale, numerics.quantize(w, Format(int4, granularity, range=GRID)).scale
    )


def test_the_method_weighs_by_what_it_saw(w, x):
    method, format = quantize.ClipSearch(range=GRID), Format(int4, PerChannel())
    statistic = stats.channel_norm()
    seen = statistic.finalize(statistic.update(statistic.init(IN), jnp.asarray(x)))
    q, _ = jax.jit(lambda w, seen: method(w, format, {"norms": seen}))(w, seen)
    direct, _ = quantize.clip_search(w, np.square(x).mean(0), format, range=GRID)
    np.testing.assert_array_equal(q.values, direct.values)
    assert set(method.statistics) == {"norms"} and not method.sequential

    def error(q):
        return np.square(x @ (w - np.asarray(numerics.dequantize(q)))).sum()

    alone = numerics.quantize(w, method.alone(format))
    assert error(q) < 0.9 * error(alone) < 0.9 * error(numerics.quantize(w, format))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_where_nothing_usable_was_seen_all_inputs_count_alike(w, bad):
    format = Format(int4, PerGroup(8))
    q, info = quantize.clip_search(w, np.full(IN, bad, np.float32), format, range=GRID)
    plain = numerics.quantize(w, quantize.ClipSearch(range=GRID).alone(format))
    assert not bool(info["weighted"])
    np.testing.assert_array_equal(q.values, plain.values)
    np.testing.assert_array_equal(q.scale, plain.scale)


def test_a_group_of_dead_inputs_counts_them_alike(w):
    moments = np.where(np.arange(IN) < 8, 0, 1).astype(np.float32)
    q, info = quantize.clip_search(w, moments, Format(int4, PerGroup(8)), range=GRID)
    scales = best_scales(w, np.ones(IN), 8)
    assert bool(info["weighted"])
    np.testing.assert_allclose(q.scale, scales, rtol=1e-5)


def test_pack_without_activations_clips_by_the_plain_error(w):
    rule = quantize.Rule(weights=Format(int4, PerChannel()), method=quantize.ClipSearch())
    packed = quantize.pack({"kernel": jnp.asarray(w)}, quantize.Policy((rule,)))["kernel"]
    plain = numerics.quantize(w, Format(int4, PerChannel(), range=MSE()))
    np.testing.assert_array_equal(packed.scale, plain.scale)


def test_the_bias_shift_is_the_shift_of_the_mean_output(w, x):
    w_hat = np.asarray(numerics.dequantize(numerics.quantize(w, Format(int4, PerChannel()))))
    shift = quantize.bias_shift(w, w_hat, x.mean(0))
    measured = (x.astype(np.float64) @ w_hat - x.astype(np.float64) @ w).mean(0)
    np.testing.assert_allclose(shift, measured, rtol=1e-4, atol=1e-5)
    assert np.abs(measured).max() > 0.01


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: quantize.ClipSearch(range=numerics.AbsMax()), errors.ArgumentTypeError, "MSE"),
        (lambda: clip(jnp.ones(3), Format(int4)), errors.ArgumentError, r"\(in,\)"),
        (lambda: clip(jnp.ones(4), Format(binary_basis(2))), errors.ArgumentError, "basis"),
        (lambda: clip(jnp.ones(4), Format(int4, PerGroup(3))), errors.ArgumentError, "divide"),
        (
            lambda: quantize.bias_shift(jnp.ones((4, 2)), jnp.ones((2, 4)), jnp.ones(4)),
            errors.ArgumentError,
            r"\(in, out\)",
        ),
    ],
)
def test_misuse(call, error, says):
    with pytest.raises(error, match=says):
        call()


def clip(moments, format):
    return quantize.clip_search(jnp.ones((4, 2)), moments, format)
