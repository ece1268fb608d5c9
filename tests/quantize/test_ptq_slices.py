"""`ptq` where slices of a leaf, or its several sites, must not be mixed up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import quantize, stats
from jaxcompress.errors import NonFiniteError
from jaxcompress.numerics import Format, PerChannel, int4
from jaxcompress.quantize import Policy, Rule, presets

PRESETS = {name: one for name, one in vars(presets).items() if isinstance(one, Policy)}
LAYERS = jax.random.normal(jax.random.key(1), (3, 8, 8)) * jnp.array([1.0, 10, 0.1])[:, None, None]
X = jax.random.normal(jax.random.key(0), (16, 8))


def unrolled(params, x):
    for k in range(3):
        x = jnp.tanh(x @ params["w"][k])
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def through_time(params, xs):
    """Apply all layers to each of some inputs in turn: a scan over layers in one over time."""
    return jax.lax.map(lambda x: scanned(params, x), xs)


@pytest.mark.parametrize("name", ["int8_static", "int4", "int4_gptq"])
def test_layers_picked_by_number_are_those_of_a_scan(name):
    by_number, by_scan = (
        quantize.ptq(fn, {"w": LAYERS}, [X, X], PRESETS[name]).params["w"]
        for fn in (unrolled, scanned)
    )
    assert (by_number.values == by_scan.values).all()
    assert jnp.allclose(by_number.scale, by_scan.scale, rtol=1e-6)
    if name == "int8_static":
        scales = by_number.activation.scale
        assert scales.shape == (3, 1, 1) and scales[0] > 2 * scales[1]
        assert jnp.allclose(scales, by_scan.activation.scale, rtol=1e-6)


def test_layers_and_time_of_one_length_are_told_apart():
    result = quantize.ptq(through_time, {"w": LAYERS}, [jnp.stack([X, X, X])], presets.int8_static)
    expected = quantize.ptq(scanned, {"w": LAYERS}, [X], presets.int8_static)
    found, wanted = (r.params["w"].activation.scale for r in (result, expected))
    assert jnp.allclose(found, wanted, rtol=0.02)  # a histogram of three times the counts


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_matrices_and_depthwise_kernels(name):
    def fn(params, x):
        image = jnp.broadcast_to(x[:, None, None, :4], (len(x), 3, 3, 4))
        y = jax.lax.conv_general_dilated(
            image,
            params["depthwise"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )
        return (x @ params["w"]).sum() + y.sum()

    params = {"w": LAYERS[0], "depthwise": LAYERS[0, :6, :6].reshape(3, 3, 1, 4)}
    result = quantize.ptq(fn, params, [X[:4]], PRESETS[name])
    least = 4 if "binary" in name or "ternary" in name else 12  # a sign alone: 4.4 dB
    assert {leaf.path for leaf in result.report.leaves} == {"w", "depthwise"}
    assert min(leaf.weight_sqnr for leaf in result.report.leaves) > least
    shapes = jax.tree.map(lambda leaf: leaf.shape, quantize.unpack(result.params))
    assert shapes == {"w": (8, 8), "depthwise": (3, 3, 1, 4)}


@pytest.mark.parametrize("layers", [1, 3])
def test_biases_take_up_the_mean_error_of_their_own_layer(layers):
    """The mean error of an output is the mean input of its layer times the error of its weights."""

    def fn(params, x):
        step = lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["b"]), None)
        return step(x, params)[0] if layers == 1 else jax.lax.scan(step, x, params)[0]

    w, b = np.asarray(LAYERS[:layers]), np.asarray(LAYERS[:layers, 0])
    params = {"w": w, "b": b} if layers > 1 else {"w": w[0], "b": b[0]}
    rule = Rule(where="w", weights=Format(int4, PerChannel()), correct_bias=True)
    result = quantize.ptq(fn, params, [X], Policy((rule,)))
    assert not result.report["w"].notes
    found = quantize.unpack(result.params)
    w_hat, b_hat = np.reshape(found["w"], w.shape), np.reshape(found["b"], b.shape)
    hidden = np.asarray(X)
    for k in range(layers):
        shift = hidden.mean(0) @ (w_hat[k] - w[k])
        np.testing.assert_allclose(b_hat[k], b[k] - shift, rtol=1e-4, atol=1e-5)
        assert np.abs(shift).max() > 1e-3
        hidden = np.tanh(hidden @ w[k] + b[k])


def test_a_leaf_contracted_both_ways_keeps_its_bias_and_says_so():
    fn = lambda params, x: (x @ params["w"] + params["b"]) @ params["w"].T
    rule = Rule(where="w", weights=Format(int4, PerChannel()), correct_bias=True)
    params = {"w": LAYERS[0, :, :6], "b": jnp.ones(6)}
    result = quantize.ptq(fn, params, [X], Policy((rule,)))
    (note,) = result.report["w"].notes
    assert "no bias was corrected" in note and "several sites" in note
    assert (result.params["b"] == 1).all()


def test_advice_is_for_those_who_call_ptq():
    with pytest.raises(NonFiniteError, match="inputs of that batch"):
        quantize.ptq(scanned, {"w": LAYERS}, [X.at[0, 0].set(jnp.nan)], presets.int4_gptq)


def test_a_method_that_does_not_replace_sees_the_function_as_it_is():
    seen = []

    class Watching(quantize.RoundToNearest):
        @property
        def statistics(self):
            return {"norms": stats.channel_norm()}

        def __call__(self, w, format, found):
            jax.debug.callback(lambda l2: seen.append(l2), found["norms"].l2)
            return super().__call__(w, format, {})

    rule = Rule(weights=Format(int4, PerChannel()), method=Watching())
    quantize.ptq(unrolled, {"w": LAYERS}, [X], Policy((rule,)))
    jax.effects_barrier()
    hidden, expected = X, []
    for k in range(3):
        expected.append(jnp.linalg.norm(hidden, axis=0))
        hidden = jnp.tanh(hidden @ LAYERS[k])
    assert len(seen) == 3
    assert all(jnp.allclose(a, b, rtol=1e-5) for a, b in zip(seen, expected, strict=True))
