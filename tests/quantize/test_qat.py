"""Quantization-aware training with straight-through rounding: values, gradients, models."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from qat_mlp import A8, A8_STATIC, W4, W8, draw_inputs, draw_params, mlp, policy, put

from jaxcompress import adapters, numerics, quantize, sparsity, train, tree
from jaxcompress.errors import (
    ArgumentError,
    ArgumentTypeError,
    SelectionError,
    StructureError,
)
from jaxcompress.numerics import (
    MSE,
    Entropy,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    float8_e4m3fn,
    int4,
    int8,
    nf4,
    uint8,
)
from jaxcompress.quantize import Policy, Rule
from jaxcompress.quantize._activations import fit_activation, round_through


@pytest.fixture(scope="module")
def params():
    return draw_params()


@pytest.fixture(scope="module")
def x():
    return draw_inputs()


def executed(qparams, x):
    """The MLP from its stored form, site by site."""

    def contract(x, q):
        form = q.activation
        if form is not None:
            shared = (0, 1) if isinstance(form.format.granularity, PerTensor) else (1,)
            x = round_through(x, *fit_activation(x, form, shared), form)
        return x @ numerics.dequantize(q)

    hidden = jax.nn.relu(contract(x, qparams["a"]))
    return contract(hidden, qparams["b"]) + qparams["bias"]


def test_values_are_those_of_a_loop_over_rows_and_columns(params, x):
    def rounded(a, axis):
        scale = np.abs(a).max(axis, keepdims=True) / 127
        return np.round(a / scale) * scale

    p = jax.tree.map(np.float64, params)
    hidden = np.maximum(rounded(np.float64(x), 1) @ rounded(p["a"], 0), 0)
    expected = rounded(hidden, 1) @ rounded(p["b"], 0) + p["bias"]
    got = quantize.train(mlp, policy(activations=A8))(params, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(got - mlp(params, x)).max() > 1e-3


CONTRACT = {
    "weights alone": policy(),
    "int8 per token": policy(activations=A8),
    "int8 per tensor": policy(activations=Format(int8)),
    "int4 groups, asymmetric": policy(
        Format(int4, PerGroup(2)), activations=Format(uint8, PerToken(), symmetric=False)
    ),
    "nf4, float8": policy(Format(nf4, PerChannel()), activations=Format(float8_e4m3fn, PerToken())),
    "int8 static": policy(activations=A8_STATIC, static=True),
    "clipped static": policy(W4, activations=Format(int8, range=MSE(points=5)), static=True),
    "float8 static": policy(activations=Format(float8_e4m3fn), static=True),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_what_is_trained_is_what_is_executed(name, params, x):
    qat = quantize.train(mlp, CONTRACT[name])
    variables = qat.init(params, x) if qat.has_state else params
    value, grads = jax.jit(jax.value_and_grad(lambda p, x: qat(p, x).sum(), allow_int=True))(
        variables, 2 * x
    )
    stored = qat.convert(variables, x)
    assert stored["bias"] is params["bias"]
    expected = executed(stored, 2 * x)
    np.testing.assert_allclose(qat(variables, 2 * x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    grads = grads["params"] if qat.has_state else grads
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
    packed = quantize.pack(params, CONTRACT[name])
    jax.tree.map(np.testing.assert_array_equal, quantize.unpack(stored), quantize.unpack(packed))


def test_gradients_are_those_at_the_rounded_values(params, x):
    qat = quantize.train(lambda p, x: x @ p["a"], policy(activations=A8))
    form = dataclasses.replace(qat.convert({"a": params["a"]}, x)["a"])
    w = numerics.dequantize(form)
    x_hat = round_through(x, *fit_activation(x, form.activation, (1,)), form.activation)
    c = jnp.arange(40.0).reshape(5, 8)
    grads = jax.grad(lambda p, x: (c * qat(p, x)).sum(), argnums=(0, 1))({"a": params["a"]}, x)
    np.testing.assert_allclose(grads[0]["a"], x_hat.T @ c, rtol=1e-5)
    np.testing.assert_allclose(grads[1], c @ w.T, rtol=1e-5)


def test_no_gradient_passes_where_a_followed_range_clips(params):
    qat = quantize.train(lambda p, x: x @ p["a"], policy(activations=Format(int8), static=True))
    one = jnp.ones((1, 6))
    variables = qat.init({"a": params["a"]}, one)
    x = one * jnp.asarray([0.1, 0.9, 1.0, 1.5, -1.0, -3.0])
    slope = jax.grad(lambda x: qat(variables, x).sum())(x)[0]
    assert ((slope != 0) == jnp.asarray([1, 1, 1, 0, 1, 0], bool)).all()


def test_transformations(params, x):
    qat = quantize.train(mlp, policy(activations=A8))
    expected = jax.jit(qat)(params, x)
    rows = jax.vmap(qat, in_axes=(None, 0))(params, x)  # its own scale per token anyway
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    loss = lambda f: jax.jit(jax.grad(lambda p: (f(p, x) ** 2).sum()))(params)
    remat = lambda p, x: jax.nn.relu(jax.checkpoint(jnp.matmul)(x, p["a"])) @ p["b"] + p["bias"]
    inner = quantize.train(remat, policy(activations=A8))
    for other in (jax.checkpoint(qat), inner):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), loss(other), loss(qat)
        )


def test_bfloat16(params, x):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    qat = quantize.train(mlp, policy(activations=A8_STATIC, static=True))
    variables = qat.init(half, x.astype(jnp.bfloat16))
    out = qat(variables, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert variables["quantizers"]["ranges"]["a"]["low"].dtype == jnp.float32
    stored = qat.convert(variables, x)
    assert stored["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, executed(stored, x.astype(jnp.bfloat16)))


def test_codes_contracted_in_the_forward_pass(params, x):
    """The values of the rounded numbers, the gradients of the unrounded ones."""
    w = jnp.stack([params["a"][:, :6], params["a"][:, 2:]])

    def fn(p, x):
        x = jax.lax.scan(lambda h, w: (jnp.sin(jnp.einsum("ij,kj->ki", w, h)), None), x, p["s"])[0]
        return x @ p["a"]

    leaves = {"s": w, "a": params["a"]}
    rules = (
        Rule(where="s", weights=Format(int4, PerChannel()), activations=A8),
        Rule(where="a", weights=W8, activations=Format(int8)),
    )
    plain = quantize.train(fn, Policy(rules))
    codes = quantize.train(fn, Policy(rules), integers=True)
    np.testing.assert_allclose(jax.jit(codes)(leaves, x), plain(leaves, x), rtol=1e-4, atol=1e-5)
    assert "i32" in str(jax.make_jaxpr(codes)(leaves, x))
    slopes = [jax.jit(jax.grad(lambda p, f=f: f(p, x).sum()))(leaves)["s"] for f in (plain, codes)]
    assert 0 < numerics.relative_error(*slopes) < 0.5 and (slopes[1] != 0).all()
    one = quantize.train(lambda p, x: x @ p["a"], Policy(rules[1:]), integers=True)
    slopes = jax.grad(lambda p, x: one(p, x).sum(), argnums=(0, 1))({"a": params["a"]}, x)
    np.testing.assert_allclose(slopes[0]["a"], jnp.tile(x.sum(0)[:, None], 8), rtol=1e-5)
    np.testing.assert_allclose(slopes[1], jnp.tile(params["a"].sum(1), (5, 1)), rtol=1e-5)
    with pytest.raises(ArgumentError, match="no site can contract codes"):
        quantize.train(mlp, policy(W4), integers=True)(params, x)


# --- Models, training loops, pruning ----------------------------------------------------------


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Conv(3, (3,))(x))
        return nn.Dense(2)(x.mean(1))


def test_a_linen_model_with_batch_norm_in_a_training_step():
    x, y = jax.random.normal(jax.random.key(0), (8, 5, 2)), jnp.arange(8) % 2
    module = Norm()
    fn, params = adapters.from_linen(
        module, module.init(jax.random.key(1), x), mutable=["batch_stats"]
    )
    qat = quantize.train(fn, policy(activations=A8_STATIC, static=True))
    variables = jax.jit(qat.init)(params, x)

    def loss(variables, batch, key):
        (logits, stats), state = qat.observe(variables, batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, train.Aux(state={"params": stats, **state})

    tx = optax.multi_transform(
        {"weights": optax.sgd(0.1), "learned": optax.sgd(0.0), "state": optax.set_to_zero()},
        quantize.labels,
    )
    step = train.make_step(loss, tx)
    state = train.init(variables, tx, key=jax.random.key(2))
    for _ in range(3):
        state, metrics = step(state, {"x": x, "y": y})
    new = state.params
    assert step.update._cache_size() == 1 and metrics["skipped"] == 0
    assert new["quantizers"]["steps"] == 3
    old_mean = params["batch_stats"]["BatchNorm_0"]["mean"]
    assert (new["params"]["batch_stats"]["BatchNorm_0"]["mean"] != old_mean).all()
    labels = dict(tree.items(quantize.labels(new)))
    assert {path for path, label in labels.items() if label == "weights"} == {
        path for path, _ in tree.items(new) if path.startswith("params/params/")
    }
    assert set(labels.values()) == {"weights", "state"}
    stored = qat.convert(new, x)
    (out, _), (expected, _) = jax.jit(qat)(new, x), jax.jit(fn)(quantize.unpack(stored), x)
    assert 0 < numerics.relative_error(expected, out) < 0.05  # activations, to 8 bits


def test_an_nnx_model(x):
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.relu)
    fn, params = adapters.from_nnx(model)
    qat = quantize.train(fn, policy(activations=A8_STATIC, static=True))
    variables = qat.init(params, x)
    assert set(tree.select(variables, quantize.learnable(variables))) == {
        "params/layers/0/bias",
        "params/layers/0/kernel",
    }
    out, state = jax.jit(qat.observe)(variables, x)
    assert out.shape == (5, 4)
    assert numerics.relative_error(fn(params, x), out) < 0.03
    assert "quantizers/ranges/layers/0/kernel/high" in tree.paths(state)


def test_training_at_4_bits_beats_rounding_afterwards():
    keys = jax.random.split(jax.random.key(5), 4)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(0.5 * x @ jax.random.normal(keys[1], (8, 3)))
    params = {
        "a": 0.5 * jax.random.normal(keys[2], (8, 16)),
        "b": 0.3 * jax.random.normal(keys[3], (16, 3)),
        "bias": jnp.zeros(3),
    }
    rule = policy(W4, activations=A8)
    qat = quantize.train(mlp, rule)

    def trained(fn, params, steps):
        tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

        def body(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: ((fn(p, x) - y) ** 2).mean())(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[0])
        return run((params, tx.init(params)))[0]

    dense = trained(mlp, params, 300)
    aware = trained(qat, dense, 300)
    error = lambda p: float(((executed(qat.convert(p, x), x) - y) ** 2).mean())
    assert error(aware) < 0.75 * error(dense)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_entries_stay_exactly_zero(params, x, symmetric):
    weights = Format(int4, PerChannel(), symmetric=symmetric)
    qat = quantize.train(mlp, policy(weights, activations=A8_STATIC, static=True))
    variables = qat.init(params, x)
    where = tree.without(tree.weights, "quantizers/**")
    tx = sparsity.sparsify(optax.adam(1e-2), schedule=0.5, every=5, where=where)

    def loss(variables, batch, key):
        out, state = qat.observe(variables, batch)
        return (out**2).sum(1), train.Aux(state=state)

    step = train.make_step(loss, tx)
    state = train.init(variables, tx, key=jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, x)
    mask = sparsity.get_mask(state.opt_state)["params"]
    stored = quantize.unpack(qat.convert(state.params, x))
    for name in ("a", "b"):
        assert (mask[name] == 0).mean() == 0.5
        assert (stored[name][~mask[name]] == 0).all() and (stored[name] != 0).any()
        rounded = numerics.fake_quant(state.params["params"][name], weights)
        np.testing.assert_array_equal(rounded, stored[name])


# --- Coverage and bad input -------------------------------------------------------------------


def odd(p, tokens, x):
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    joined = x @ jnp.concatenate([p["q"], p["k"]], axis=1)
    return (p["embed"][tokens] + p["pos"]) @ p["q"] + own(x, p["own"]), joined


def test_every_leaf_and_site_is_accounted_for(params, x):
    square = jnp.ones((6, 6))
    leaves = {"embed": square, "pos": square, "q": square, "k": square, "own": square}
    qat = quantize.train(odd, policy(activations=A8))
    account = qat.coverage(leaves, jnp.arange(6), jnp.ones((6, 6)))
    assert account.elsewhere == ("pos",)
    assert list(account.rounded) == ["q#1"]
    assert "indices" in account.unrounded["embed"]
    assert "custom_vjp" in account.unrounded["own"]
    assert "together with 'k'" in account.unrounded["q"]
    strict = quantize.train(odd, policy(activations=A8), strict=True)
    with pytest.raises(SelectionError, match="'pos' has no site"):
        strict(leaves, jnp.arange(6), jnp.ones((6, 6)))


def test_policies_without_effect_are_refused(params, x):
    with pytest.raises(SelectionError, match=r"none of which fn contracts.*'a', 'b'"):
        quantize.train(
            lambda p, x: mlp(p, x) + p["table"].sum(),
            Policy((Rule(where="table", weights=W8),)),
        )({**params, "table": jnp.ones((2, 2))}, x)
    with pytest.raises(SelectionError, match="indices"):
        quantize.train(lambda p, t: p["a"][t], policy(activations=A8))(
            {"a": params["a"]}, jnp.arange(3)
        )
    with pytest.raises(SelectionError, match="kernel"):
        quantize.train(mlp, Policy((Rule(where="**/kernel", weights=W8),)))(params, x)


def test_options_out_of_range_or_without_effect_are_refused():
    static = policy(activations=Format(int8), static=True)
    with pytest.raises(ArgumentTypeError, match="quantize.Policy"):
        quantize.train(mlp, static.rules[0])
    for options, says in (
        ({"start": -1}, "`start`"),
        ({"freeze": -1}, "`freeze`"),
        ({"decay": 1.0}, "`decay`"),
        ({"weights": "ste"}, "a quantizer"),
    ):
        with pytest.raises(ArgumentError, match=says):
            quantize.train(mlp, static, **options)
    with pytest.raises(ArgumentError, match="no range is followed"):
        quantize.train(mlp, policy(activations=A8), freeze=3)
    entropy = Format(int8, range=Entropy())
    with pytest.raises(ArgumentError, match="histogram"):
        quantize.train(mlp, policy(activations=entropy, static=True))


def test_params_and_variables_are_told_apart(params, x):
    plain = quantize.train(mlp, policy())
    static = quantize.train(mlp, policy(activations=Format(int8), static=True))
    variables = static.init(params, x)
    for call in (static, static.observe):
        with pytest.raises(StructureError, match="qat.init"):
            call(params, x)
    with pytest.raises(StructureError, match='variables\\["params"\\]'):
        plain(variables, x)
    np.testing.assert_array_equal(plain(plain.init(params, x), x), plain(params, x))
    other = {"params": {**params, "c": params["a"]}, "quantizers": variables["quantizers"]}
    with pytest.raises(StructureError, match="none for 'c'"):
        quantize.train(lambda p, x: mlp(p, x) + (x @ p["c"]).sum(), static.policy)(other, x)
    with pytest.raises(StructureError, match="'a', which params do not have"):
        static({**variables, "params": {"b": params["b"]}}, x)
    wrong = jax.tree.map(lambda r: r[0], variables["quantizers"]["ranges"])
    with pytest.raises(StructureError, match=r"the shapes \{.*'low': \(1, 1\)"):
        static(put(variables, {"quantizers": {"ranges": wrong}}), x)
