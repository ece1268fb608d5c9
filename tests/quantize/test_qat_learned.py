"""Quantization-aware training with LSQ, LSQ+, PACT and DoReFa."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import numerics, quantize, train, tree
from jaxcompress.errors import ArgumentError, StructureError
from jaxcompress.numerics import (
    Codebook,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    binary,
    int4,
    int8,
    nf4,
    uint4,
    uint8,
)
from jaxcompress.quantize import LSQ, PACT, STE, DoReFa, LSQPlus, Policy, Rule
from jaxcompress.quantize._activations import fit_activation, round_through

W4, W8 = Format(int4, PerChannel()), Format(int8, PerChannel())
SIGNED = Format(int4)
UNSIGNED = Format(uint4)
SHIFTED = Format(int4, symmetric=False)


def policy(weights=W4, activations=None):
    return Policy((Rule(weights=weights, activations=activations),))


def linear(params, x):
    return x @ params["w"]


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def params():
    a, b = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(a, (6, 8)), "b": jax.random.normal(b, (8, 4))}


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (5, 6), minval=-0.5, maxval=2.0)


def with_learned(variables, learned):
    return {**variables, "quantizers": {**variables["quantizers"], "learned": learned}}


def slopes(qat, variables, x, c):
    """Gradients of sum(c * qat) with respect to what is learned, and to params and x."""

    def value(learned, params, x):
        return (c * qat(with_learned({**variables, "params": params}, learned), x)).sum()

    return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(
        variables["quantizers"]["learned"], variables["params"], x
    )


CONTRACT = {
    "LSQ": (W4, UNSIGNED, LSQ(), LSQ()),
    "LSQ in groups": (Format(int4, PerGroup(2)), SIGNED, LSQ(), STE()),
    "STE, LSQ": (W8, Format(uint8), STE(), LSQ()),
    "LSQ+": (W4, SHIFTED, LSQPlus(), LSQPlus()),
    "PACT": (W4, UNSIGNED, STE(), PACT()),
    "PACT, asymmetric": (W4, SHIFTED, LSQ(), PACT(alpha=1.5)),
    "DoReFa": (Format(int4), UNSIGNED, DoReFa(), DoReFa()),
    "DoReFa, one bit": (Format(binary), SHIFTED, DoReFa(), DoReFa()),
    "DoReFa, per channel": (W8, None, DoReFa(), STE()),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_what_is_trained_is_what_is_executed(name, params, x):
    weights, activations, of_weights, of_activations = CONTRACT[name]
    qat = quantize.train(
        mlp, policy(weights, activations), weights=of_weights, activations=of_activations
    )
    variables = jax.jit(qat.init)(params, x) if qat.has_state else params
    if qat.has_state:  # as if training had moved what is learned, off any grid
        learned = jax.tree.map(lambda s: 0.83 * s, variables["quantizers"]["learned"])
        variables = with_learned(variables, learned)
    value, slope = jax.jit(jax.value_and_grad(lambda p, x: (qat(p, x) ** 2).sum(), allow_int=True))(
        variables, 1.5 * x
    )
    stored = qat.convert(variables, x)

    def contract(x, q):
        if q.activation is not None:
            form = q.activation
            assert form.scale is None or form.scale.shape == (1, 1)
            x = round_through(x, *fit_activation(x, form, (0, 1)), form)
        return x @ numerics.dequantize(q)

    expected = contract(jax.nn.relu(contract(1.5 * x, stored["a"])), stored["b"])
    np.testing.assert_allclose(value, (expected**2).sum(), rtol=1e-5)
    slope = (
        slope if not qat.has_state else {"p": slope["params"], "q": slope["quantizers"]["learned"]}
    )
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(slope))


# --- Gradients against closed forms -----------------------------------------------------------


def lsq_slope(x, s, low, high):
    """Esser et al., equations 3 and 5: of the step (times g), and of x."""
    t = x / s
    inside = (t >= low) & (t <= high)
    step = np.where(t < low, low, np.where(t > high, high, np.round(t) - t))
    return step, inside


@pytest.mark.parametrize(("mean", "step"), [(0.0, 1.0), (0.7, 2 * 0.7 / np.sqrt(7))])
def test_lsq_starts_with_a_usable_step_where_only_zeros_were_seen(mean, step):
    seen = types.SimpleNamespace(mean=np.float32(mean))
    np.testing.assert_allclose(LSQ().init_activations(seen, SIGNED)["step"], step, rtol=1e-6)


def test_gradients_of_lsq():
    w = np.asarray([[0.3, -1.0], [2.3, 0.5], [-0.9, 0.2]], np.float32)
    x = np.asarray([[0.2, 1.3, 9.0], [0.7, 0.1, 0.4]], np.float32)
    c = np.asarray([[1.0, -2.0], [0.5, 3.0]], np.float32)
    qat = quantize.train(linear, policy(W4, UNSIGNED), weights=LSQ(), activations=LSQ())
    variables = qat.init({"w": jnp.asarray(w)}, x)
    learned = variables["quantizers"]["learned"]["w"]
    np.testing.assert_allclose(learned["weights"]["step"], numerics.lsq_init(w, W4))
    np.testing.assert_allclose(
        learned["activations"]["step"], numerics.lsq_init(x, UNSIGNED), rtol=1e-6
    )
    s, a = np.asarray([[0.25, 0.13]], np.float32), np.float32(0.3)
    learned = {"weights": {"step": jnp.asarray(s)}, "activations": {"step": jnp.full((1, 1), a)}}
    got, by_params, by_x = slopes(qat, with_learned(variables, {"w": learned}), x, c)
    w_step, w_inside = lsq_slope(w, s, -7, 7)
    x_step, x_inside = lsq_slope(x, a, 0, 15)
    w_hat = np.round(np.clip(w / s, -7, 7)) * s
    x_hat = np.round(np.clip(x / a, 0, 15)) * a
    g_w, g_x = x_hat.T @ c, c @ w_hat.T
    expected = (g_w * w_step).sum(0, keepdims=True) / np.sqrt(3 * 7)
    np.testing.assert_allclose(got["w"]["weights"]["step"], expected, rtol=1e-4)
    expected = (g_x * x_step).sum() / np.sqrt(6 * 15)
    np.testing.assert_allclose(got["w"]["activations"]["step"], [[expected]], rtol=1e-4)
    np.testing.assert_allclose(by_params["w"], g_w * w_inside, rtol=1e-5)
    np.testing.assert_allclose(by_x, g_x * x_inside, rtol=1e-5)
    assert not w_inside.all() and not x_inside.all()


def test_gradients_of_lsq_plus():
    w = np.asarray([[0.3, -1.0], [2.3, 0.5], [-0.9, 0.2]], np.float32)
    x = np.asarray([[-0.2, 1.3, 9.0], [-4.0, 0.1, 0.4]], np.float32)
    c = np.asarray([[1.0, -2.0], [0.5, 3.0]], np.float32)
    qat = quantize.train(linear, policy(W4, SHIFTED), weights=LSQPlus(), activations=LSQPlus())
    variables = qat.init({"w": jnp.asarray(w)}, x)
    learned = variables["quantizers"]["learned"]["w"]
    reach = np.maximum(abs(w.mean(0) - 3 * w.std(0)), abs(w.mean(0) + 3 * w.std(0)))
    np.testing.assert_allclose(learned["weights"]["step"], reach[None] / 8, rtol=1e-5)
    step, offset = numerics.lsq_plus_init(x, SHIFTED)
    np.testing.assert_allclose(learned["activations"]["step"], step, rtol=1e-6)
    np.testing.assert_allclose(learned["activations"]["offset"], offset, rtol=1e-5)
    s, b = np.float32(0.3), np.float32(1.55)  # of which the nearest multiple is 5 steps
    entry = {"step": jnp.full((1, 1), s), "offset": jnp.full((1, 1), b)}
    moved = {"w": {**learned, "activations": entry}}
    got, _, by_x = slopes(qat, with_learned(variables, moved), x, c)
    w_hat = numerics.lsq(w, learned["weights"]["step"], W4)
    g_x = c @ np.asarray(w_hat).T
    x_step, inside = lsq_slope(x - 5 * s, s, -8, 7)
    scale = 1 / np.sqrt(6 * 7)
    np.testing.assert_allclose(
        got["w"]["activations"]["step"], [[(g_x * x_step).sum() * scale]], rtol=1e-4
    )
    np.testing.assert_allclose(
        got["w"]["activations"]["offset"], [[(g_x * ~inside).sum() * scale]], rtol=1e-4
    )
    np.testing.assert_allclose(by_x, g_x * inside, rtol=1e-5)
    form = qat.convert(with_learned(variables, moved), x)["w"].activation
    assert form.zero == -5 and 0 < inside.sum() < 6
    paper = quantize.train(linear, qat.policy, weights=LSQ(), activations=LSQPlus(whole=False))
    out = paper(with_learned(variables, moved), x)
    expected = numerics.lsq_plus(x, entry["step"], entry["offset"], SHIFTED) @ w_hat
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_an_offset_that_leaves_no_code_for_zero_is_held_back():
    quantizer = LSQPlus()
    entry = {"step": jnp.float32(0.5), "offset": jnp.float32(50.0)}
    form = quantizer.settle(entry, SHIFTED)
    assert form.zero == -8  # the range is [0, 7.5]
    assert quantizer.activations(jnp.zeros(1), entry, SHIFTED) == 0
    start = quantizer.init_activations(
        quantize._quantizer.SeenRange(jnp.float32(2.0), jnp.float32(7.5), jnp.float32(3.0)), SHIFTED
    )
    assert start["step"] == 0.5 and start["offset"] == 4.0


def test_gradients_of_pact():
    w = np.asarray([[0.3, -1.0], [2.0, 0.5], [-0.9, 0.2]], np.float32)
    x = np.asarray([[-0.2, 1.3, 9.0], [2.0, 0.1, 0.4]], np.float32)
    c = np.asarray([[1.0, -2.0], [0.5, 3.0]], np.float32)
    qat = quantize.train(linear, policy(W8, UNSIGNED), activations=PACT())
    variables = qat.init({"w": jnp.asarray(w)}, x)
    assert variables["quantizers"]["learned"]["w"]["activations"]["alpha"] == 9.0
    learned = {"w": {"activations": {"alpha": jnp.full((1, 1), 2.0)}}}
    got, _, by_x = slopes(qat, with_learned(variables, learned), x, c)
    g_x = c @ np.asarray(numerics.fake_quant(w, W8)).T
    expected = (g_x * (x >= 2)).sum()
    np.testing.assert_allclose(got["w"]["activations"]["alpha"], [[expected]], rtol=1e-5)
    np.testing.assert_allclose(by_x, g_x * ((x >= 0) & (x < 2)), rtol=1e-5)
    form = qat.convert(with_learned(variables, learned), x)["w"].activation
    np.testing.assert_allclose(form.scale, [[2 / 15]], rtol=1e-6)
    assert qat.init({"w": jnp.asarray(w)}, -x * (x > 9))["quantizers"]["learned"]["w"] == {
        "activations": {"alpha": jnp.ones((1, 1))}
    }


def test_dorefa_is_stored_in_its_own_levels(params, x):
    qat = quantize.train(
        linear, policy(Format(int4), UNSIGNED), weights=DoReFa(), activations=DoReFa()
    )
    assert not qat.has_state
    w = {"w": params["a"]}
    q = qat.convert(w, x)["w"]
    assert isinstance(q.format.qtype, Codebook) and q.format.qtype.bits == 4
    assert q.format.qtype.levels == tuple((2 * k - 15) / 15 for k in range(16))
    w_hat = numerics.dorefa_weights(params["a"], bits=4)
    np.testing.assert_allclose(numerics.dequantize(q), w_hat, atol=1e-6)
    expected = numerics.dorefa_activations(x, bits=4) @ w_hat
    np.testing.assert_allclose(qat(w, x), expected, rtol=1e-5)
    axes = numerics.dorefa_weights(params["a"], bits=4, axes=(0,))
    apart = [numerics.dorefa_weights(column, bits=4) for column in params["a"].T]
    np.testing.assert_allclose(axes, jnp.stack(apart, 1), atol=1e-6)


def test_a_step_that_training_drove_below_zero_stays_usable(params, x):
    qat = quantize.train(linear, policy(W4, SIGNED), weights=LSQ(), activations=LSQ())
    variables = qat.init({"w": params["a"]}, x)
    learned = jax.tree.map(lambda s: -s, variables["quantizers"]["learned"])
    got, *_ = slopes(qat, with_learned(variables, learned), x, jnp.ones((5, 8)))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(got))
    assert jnp.isfinite(qat(with_learned(variables, learned), x)).all()


# --- Training, and bad input ------------------------------------------------------------------


def test_training_moves_steps_at_their_own_rate(params, x):
    qat = quantize.train(mlp, policy(W4, UNSIGNED), weights=LSQ(), activations=LSQ())
    variables = jax.jit(qat.init)(params, jnp.abs(x))
    y = jnp.ones((5, 4))

    def loss(variables, batch, key):
        out, state = qat.observe(variables, jnp.abs(batch["x"]))
        return ((out - batch["y"]) ** 2).mean(1), train.Aux(state=state)

    tx = optax.multi_transform(
        {"weights": optax.adam(3e-2), "learned": optax.adam(1e-3), "state": optax.set_to_zero()},
        quantize.labels,
    )
    step = train.make_step(loss, tx)
    state = train.init(variables, tx, key=jax.random.key(0))
    losses = []
    for _ in range(30):
        state, metrics = step(state, {"x": x, "y": y})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0] and state.params["quantizers"]["steps"] == 30
    before, after = (v["quantizers"]["learned"] for v in (variables, state.params))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before, after)
    assert all(0 < m < 0.031 for m in jax.tree.leaves(moved))
    labels = dict(tree.items(quantize.labels(variables)))
    assert {path.rsplit("/", 1)[1]: label for path, label in labels.items()} == {
        "a": "weights",
        "b": "weights",
        "step": "learned",
        "steps": "state",
    }


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        (policy(Format(nf4)), {"weights": LSQ()}, "a symmetric integer format"),
        (policy(SHIFTED), {"weights": LSQPlus()}, "a symmetric integer format"),
        (policy(W4, SIGNED), {"activations": LSQPlus()}, "an asymmetric integer format"),
        (policy(W4, SIGNED), {"activations": PACT()}, "an unsigned or an asymmetric"),
        (policy(W4), {"weights": PACT()}, "clips activations"),
        (policy(Format(nf4)), {"weights": DoReFa()}, "an integer format, or binary"),
        (policy(W4, Format(int8, PerToken())), {"activations": LSQ()}, r"PerTensor\(\) where"),
        (policy(W4), {"activations": LSQ()}, "no format for activations"),
    ],
)
def test_formats_that_a_method_is_not_defined_for(rule, options, says):
    with pytest.raises(ArgumentError, match=says):
        quantize.train(mlp, rule, **options)


@pytest.mark.parametrize(("made", "taken"), [(PACT(), LSQ()), (LSQ(), PACT()), (LSQ(), STE())])
def test_variables_of_another_quantizer(made, taken, params, x):
    """What it learned has other names; `STE` follows ranges, and learns nothing."""
    rules = Policy((Rule(weights=W8, activations=UNSIGNED, static=True),))
    variables = quantize.train(mlp, rules, activations=made).init(params, x)
    other = quantize.train(mlp, rules, activations=taken)
    with pytest.raises(StructureError, match="`variables`"):
        other(variables, x)


def test_variables_of_another_training(params, x):
    lsq = quantize.train(mlp, policy(W4, UNSIGNED), weights=LSQ(), activations=LSQ())
    variables = lsq.init(params, x)
    with pytest.raises(StructureError, match="qat.init"):
        lsq(params, x)
    with pytest.raises(StructureError, match="qat.init"):
        lsq.convert(params, x)
    pact = quantize.train(mlp, policy(W4, UNSIGNED), activations=PACT())
    with pytest.raises(StructureError, match="what is learned of weights: some for 'a', 'b'"):
        pact(variables, x)
    grouped = quantize.train(mlp, policy(Format(int4, PerTensor())), weights=LSQ())
    with pytest.raises(StructureError, match=r"\(1, 1\)|activations"):
        grouped(variables, x)
    with pytest.raises(ArgumentError, match="a positive clipping level"):
        PACT(alpha=0.0)
