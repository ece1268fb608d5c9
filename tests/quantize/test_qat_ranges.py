"""Quantization-aware training with ranges that are followed from call to call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qat_mlp import A8_STATIC, W4, W8, draw_inputs, draw_params, mlp, policy, put

from jaxcompress import numerics, quantize
from jaxcompress.errors import (
    ArgumentError,
    NonFiniteError,
)
from jaxcompress.numerics import (
    Format,
    int8,
    uint8,
)
from jaxcompress.quantize._activations import fit_activation, round_through


@pytest.fixture(scope="module")
def params():
    return draw_params()


@pytest.fixture(scope="module")
def x():
    return draw_inputs()


# --- Followed ranges --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def followed():
    """Four observed calls with start=2 and freeze=3, by one compiled function."""
    qat = quantize.train(
        lambda p, x: x @ p["a"],
        policy(W4, activations=Format(uint8, symmetric=False), static=True),
        start=2,
        freeze=3,
        decay=0.5,
    )
    params = {"a": jnp.linspace(-1, 1, 6).reshape(3, 2)}
    xs = [jnp.asarray([[-1.0, 0.3, high]]) for high in (2.0, 4.0, 8.0, 100.0, 50.0)]
    variables = [qat.init(params, xs[0])]
    observe, outputs = jax.jit(qat.observe), []
    for x in xs[1:]:
        out, state = observe(variables[-1], x)
        outputs.append(out)
        variables.append(put(variables[-1], state))
    return qat, params, xs, variables, outputs, observe._cache_size()


def test_ranges_are_corrected_moving_averages_until_they_freeze(followed):
    _, _, xs, variables, _, _ = followed
    highs = [float(x.max()) for x in xs]
    for n, now in enumerate(variables):
        seen = min(n, 3) + 1  # the first batch, and three calls until it freezes
        weights = 0.5 ** np.arange(seen)[::-1]
        expected = (weights * highs[:seen]).sum() / weights.sum()
        entry = now["quantizers"]["ranges"]["a"]
        np.testing.assert_allclose(entry["high"], [[expected]], rtol=1e-6)
        assert entry["low"] == -1 and entry["count"] == seen
        assert now["quantizers"]["steps"] == n


def test_rounding_starts_late_in_one_compiled_function(followed):
    qat, params, xs, variables, outputs, compiled = followed
    assert compiled == 1
    plain = [x @ params["a"] for x in xs[1:]]
    assert all((a == b).all() for a, b in zip(outputs[:2], plain[:2], strict=True))
    assert all((a != b).any() for a, b in zip(outputs[2:], plain[2:], strict=True))
    later = qat(variables[2], xs[1])
    q = qat.convert(variables[2], xs[0])["a"]
    rounded = round_through(xs[1], *fit_activation(xs[1], q.activation, (0, 1)), q.activation)
    np.testing.assert_allclose(later, rounded @ numerics.dequantize(q), rtol=1e-6)


def test_layers_of_a_scan_have_ranges_of_their_own():
    keys = jax.random.split(jax.random.key(3), 2)
    w, x = jax.random.normal(keys[0], (2, 4, 4)), jax.random.normal(keys[1], (3, 4))

    def scanned(p, x):
        def layers(h, _):  # as many turns of the outer loop as layers
            return jax.lax.scan(lambda h, w: (jnp.sin(3 * h @ w), None), h, p["w"])[0], None

        return jax.lax.scan(layers, x, length=2)[0]

    def unrolled(p, x):
        for name in ("0", "1", "0", "1"):
            x = jnp.sin(3 * x @ p[name])
        return x

    options = {"activations": A8_STATIC, "static": True}
    stacked = quantize.train(scanned, policy(**options))
    apart = quantize.train(unrolled, policy(**options))
    a = jax.jit(stacked.init)({"w": w}, x)
    b = jax.jit(apart.init)({"0": w[0], "1": w[1]}, x)
    ranges = a["quantizers"]["ranges"]["w"]
    assert ranges["high"].shape == (2, 1, 1) and ranges["high"][0] != ranges["high"][1]
    np.testing.assert_allclose(jax.jit(stacked)(a, x), jax.jit(apart)(b, x), rtol=1e-5, atol=1e-5)
    state = jax.jit(stacked.observe)(a, 2 * x)[1]
    other = jax.jit(apart.observe)(b, 2 * x)[1]
    for k in range(2):
        jax.tree.map(
            lambda one, both, k=k: np.testing.assert_allclose(both[k], one, rtol=1e-5),
            other["quantizers"]["ranges"][str(k)],
            state["quantizers"]["ranges"]["w"],
        )
    assert stacked.convert(a, x)["w"].activation.scale.shape == (2, 1, 1)


def test_a_tied_leaf_is_rounded_once_and_its_sites_share_a_range():
    def tied(p, tokens):
        h = p["embed"][tokens]
        h = jnp.tanh(h @ p["embed"].T) @ p["embed"]
        return h @ p["embed"].T

    embed = jax.random.normal(jax.random.key(4), (5, 3))
    tokens = jnp.arange(4)
    qat = quantize.train(tied, policy(activations=Format(int8), static=True))
    variables = qat.init({"embed": embed}, tokens)
    w = embed
    inputs = [w[tokens], jnp.tanh(w[tokens] @ w.T), jnp.tanh(w[tokens] @ w.T) @ w]
    entry = variables["quantizers"]["ranges"]["embed"]
    np.testing.assert_allclose(entry["high"], [[max(map(jnp.max, inputs))]], rtol=1e-6)
    q = qat.convert(variables, tokens)["embed"]
    w = numerics.dequantize(q)
    act = lambda x: round_through(x, *fit_activation(x, q.activation, (0, 1)), q.activation)
    expected = act(act(jnp.tanh(act(w[tokens]) @ w.T)) @ w) @ w.T
    np.testing.assert_allclose(qat(variables, tokens), expected, rtol=1e-5, atol=1e-6)
    account = qat.coverage(variables, tokens)
    assert list(account.rounded) == ["embed#1", "embed#2", "embed#3"]
    assert "indices" in account.unrounded["embed"]


def test_a_branch_not_taken_leaves_its_range_unknown_and_rounds_nothing(params, x):
    def fn(p, x, first):
        one, other = lambda: x @ p["a"], lambda: (x + 1) @ p["c"]
        return jax.lax.cond(first, one, other)

    both = {"a": params["a"], "c": -params["a"]}
    qat = quantize.train(fn, policy(activations=Format(int8), static=True))
    variables = qat.init(both, x, True)
    counts = {
        path: int(entry["count"].sum()) for path, entry in variables["quantizers"]["ranges"].items()
    }
    assert counts == {"a": 1, "c": 0}
    w = numerics.fake_quant(both["c"], W8)
    np.testing.assert_allclose(qat(variables, x, False), (x + 1) @ w, rtol=1e-5)
    with pytest.raises(ArgumentError, match="'c' that no call has seen"):
        qat.convert(variables, x, True)
    variables = put(variables, qat.observe(variables, x, False)[1])
    assert qat.convert(variables, x, True)["c"].activation.is_static


def test_batches_that_are_not_finite_or_all_zero(params, x):
    qat = quantize.train(mlp, policy(activations=Format(int8), static=True))
    with pytest.raises(NonFiniteError, match="'a'"):
        qat.init(params, x.at[0, 0].set(jnp.inf))
    variables = qat.init(params, jnp.zeros_like(x))
    assert jnp.isfinite(qat(variables, x)).all()
    _, state = qat.observe(variables, x * jnp.nan)
    jax.tree.map(
        np.testing.assert_array_equal,
        state["quantizers"]["ranges"],
        variables["quantizers"]["ranges"],
    )
