"""LSQ, LSQ+, PACT and DoReFa against their papers' equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError
from jaxcompress.numerics import Convention, Format, PerChannel, PerGroup, PerTensor, int4, uint4

pytestmark = pytest.mark.usefixtures("strict_promotion")
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
G = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)  # the loss's gradient
FORMATS = [
    Format(int4, PerTensor(), convention=Convention.TIGHT),
    Format(int4, PerChannel()),
    Format(uint4, PerGroup(4)),
]


def blocked(x, format):
    return np.asarray(format.granularity.block(jnp.asarray(x)), np.float64)


@pytest.mark.parametrize("format", FORMATS, ids=["tensor", "channel", "group"])
def test_lsq_follows_equations_1_to_5(format):
    step = 0.5 * numerics.lsq_init(X, format)
    y, pull = jax.vjp(lambda x, s: numerics.lsq(x, s, format), X, step)
    dx, ds = pull(jnp.asarray(G))

    x, g, s = blocked(X, format), blocked(G, format), np.asarray(step, np.float64)
    low, high = format.limits
    t = x / s
    code = np.round(np.clip(t, low, high))
    inside = (t > low) & (t < high)
    shared = format.granularity.shared(2)
    n = np.prod([x.shape[axis] for axis in shared])
    per_entry = np.where(inside, code - t, code)
    expected = (g * per_entry).sum(shared, keepdims=True) / np.sqrt(n * high)
    np.testing.assert_allclose(blocked(y, format), code * s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(blocked(dx, format), g * inside, rtol=1e-5)
    np.testing.assert_allclose(ds, expected, rtol=1e-4, atol=1e-5)
    assert 0 < inside.mean() < 1

    stored = numerics.dequantize(numerics.quantize(X, format, scale=step))
    np.testing.assert_array_equal(y, stored)


def test_lsq_starts_from_the_paper():
    format = Format(int4, PerChannel())
    expected = 2 * np.abs(X).mean(0, keepdims=True) / np.sqrt(7)
    np.testing.assert_allclose(numerics.lsq_init(X, format), expected, rtol=1e-6)
    assert (numerics.lsq_init(0 * X, format) == 1).all()


def test_lsq_plus_follows_its_equations():
    format = Format(int4, PerChannel(), symmetric=False)
    x0 = X + 1.3
    step, offset = numerics.lsq_plus_init(x0, format)
    np.testing.assert_allclose(step, (x0.max(0) - x0.min(0))[None] / 15, rtol=1e-6)
    # With the initial offset the range is covered end to end.
    np.testing.assert_allclose(-8 * step + offset, x0.min(0)[None], rtol=1e-4)
    step = step * 0.6
    y, pull = jax.vjp(lambda x, s, b: numerics.lsq_plus(x, s, b, format), x0, step, offset)
    dx, ds, db = pull(jnp.asarray(G))

    s, b = np.asarray(step, np.float64), np.asarray(offset, np.float64)
    t = (x0 - b) / s
    code = np.round(np.clip(t, -8, 7))
    inside = (t > -8) & (t < 7)
    factor = 1 / np.sqrt(8 * 7)
    np.testing.assert_allclose(y, code * s + b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, G * inside, atol=1e-6)
    np.testing.assert_allclose(
        ds, (G * np.where(inside, code - t, code)).sum(0, keepdims=True) * factor, rtol=1e-3
    )
    np.testing.assert_allclose(db, (G * ~inside).sum(0, keepdims=True) * factor, atol=1e-5)
    assert 0 < inside.mean() < 1


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_pact_follows_equations_1_to_3(bits):
    alpha = np.float32(0.8)
    x = np.append(X.ravel(), alpha)  # at alpha the level, not x, gets the gradient
    y, pull = jax.vjp(lambda x, a: numerics.pact(x, a, bits=bits), x, alpha)
    dx, da = pull(jnp.ones(x.shape))
    clipped = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    steps = 2**bits - 1
    np.testing.assert_allclose(y, np.round(clipped * steps / alpha) * alpha / steps, atol=1e-6)
    np.testing.assert_array_equal(dx, (x >= 0) & (x < alpha))
    assert float(da) == (x >= alpha).sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights_follow_the_paper(bits):
    y, pull = jax.vjp(lambda x: numerics.dorefa_weights(x, bits=bits), X)
    steps = 2**bits - 1
    squeezed = np.tanh(X)
    unit = squeezed / (2 * np.abs(squeezed).max()) + 0.5
    np.testing.assert_allclose(y, 2 * np.round(unit * steps) / steps - 1, atol=1e-6)
    # With q_k as the identity the rest is differentiated as it stands, the maximum too.
    smooth = jax.vjp(lambda x: jnp.tanh(x) / jnp.abs(jnp.tanh(x)).max(), jnp.asarray(X))[1]
    np.testing.assert_allclose(pull(jnp.asarray(G))[0], smooth(jnp.asarray(G))[0], atol=1e-5)
    assert (numerics.dorefa_weights(0 * X, bits=bits) != 0).all()  # 0 is no level of this method


def test_dorefa_of_one_bit_is_the_mean_magnitude():
    y, pull = jax.vjp(lambda x: numerics.dorefa_weights(x, bits=1), X)
    np.testing.assert_allclose(y, np.sign(X) * np.abs(X).mean(), rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.asarray(G))[0], G)


def test_dorefa_activations_follow_the_paper():
    y, pull = jax.vjp(lambda x: numerics.dorefa_activations(x, bits=2), X)
    np.testing.assert_allclose(y, np.round(np.clip(X, 0, 1) * 3) / 3, atol=1e-6)
    np.testing.assert_array_equal(pull(jnp.asarray(G))[0], np.where((X >= 0) & (X <= 1), G, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_stay_narrow(dtype):
    x = jnp.asarray(X, dtype)
    symmetric, asymmetric = Format(int4), Format(int4, symmetric=False)
    one = jnp.ones((1, 1))
    outputs = [
        numerics.lsq(x, one, symmetric),
        numerics.lsq_plus(x, one, one, asymmetric),
        numerics.pact(x, 1.0, bits=4),
        numerics.dorefa_weights(x, bits=4),
        numerics.dorefa_activations(x, bits=4),
    ]
    assert all(y.dtype == dtype and jnp.isfinite(y).all() for y in outputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: numerics.lsq(X, jnp.ones((1, 1)), Format(numerics.nf4)),
        lambda: numerics.lsq(X, jnp.ones((1, 1)), Format(int4, symmetric=False)),
        lambda: numerics.lsq(X, jnp.ones(6), Format(int4, PerChannel())),
        lambda: numerics.lsq_plus(X, jnp.ones((1, 1)), jnp.ones((1, 1)), Format(int4)),
        lambda: numerics.lsq_init(X, Format(int4, PerGroup(3))),
        lambda: numerics.pact(X, 1.0, bits=0),
        lambda: numerics.dorefa_weights(X, bits=9),
        lambda: numerics.dorefa_activations(X, bits=2.5),
    ],
)
def test_misuse_of_learned_quantizers_is_refused(call):
    with pytest.raises(ArgumentError):
        call()


def test_lsq_equals_the_stored_form_with_a_narrow_scale():
    x = jax.random.normal(jax.random.key(0), (64, 16))
    format = Format(int4, PerChannel(), scale_dtype=jnp.bfloat16)
    step = numerics.lsq_init(x, format)
    stored = numerics.dequantize(numerics.quantize(x, format, scale=step))
    np.testing.assert_array_equal(numerics.lsq(x, step, format), stored)
