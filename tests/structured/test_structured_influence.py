"""Scores of depth, gates and their penalty, and the choice of layers for a budget."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from depth_models import X, draw, layer, scanned, stacked_params, unrolled, unrolled_params
from zoo import ZOO

from jaxcompress import graph, structured, tree
from jaxcompress.budget import Bytes, Flops, Params, Seconds
from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError, SelectionError

BATCHES = [draw(7, 5, 4), draw(8, 3, 4)]
TARGETS = [draw(17, 5, 2), draw(18, 3, 2)]


def stream(x):
    """The stream before, between and after the three layers, by NumPy."""
    states, params = [np.asarray(x, np.float64)], unrolled_params()
    for k in range(3):
        p = {n: np.asarray(leaf, np.float64) for n, leaf in params[f"layer_{k}"].items()}
        states.append(states[-1] + np.tanh(states[-1] @ p["up"]) @ p["down"])
    return states


def turn(x, y):
    return 1 - (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def expected_influence():
    streams = [np.concatenate(each) for each in zip(*map(stream, BATCHES), strict=True)]
    return [turn(streams[k], streams[k + 1]).mean() for k in range(3)]


# --- influence ------------------------------------------------------------------------------------


def test_influence_of_each_layer_is_that_of_a_loop():
    found = structured.block_influence(unrolled, unrolled_params(), BATCHES)
    assert list(found) == ["layer_0", "layer_1", "layer_2"]
    np.testing.assert_allclose(list(found.values()), expected_influence(), rtol=1e-5)


@pytest.mark.parametrize("level", ["layer", "block"])
def test_influence_in_a_stack(level):
    found = structured.block_influence(scanned, stacked_params(), iter(BATCHES), level=level)
    assert list(found) == ["layers[0]", "layers[1]", "layers[2]"]
    np.testing.assert_allclose(list(found.values()), expected_influence(), rtol=1e-5)


@pytest.fixture(scope="module")
def two_llamas():
    """The zoo's stacked model, and the same weights layer by layer."""
    fn, params, inputs = ZOO["llama_scanned_nnx"].build()
    plain, like, _ = ZOO["llama"].build()
    stacked = dict(tree.items(params))

    def pick(path, leaf):
        parts = path.split("/")[1:]
        if parts[0].startswith("layers_"):
            k = int(parts[0][-1])
            return stacked["/".join(["layers", *parts[1:]])][k]
        return stacked["/".join(parts)]

    return fn, params, plain, tree.map_with_path(pick, like), inputs


@pytest.mark.parametrize("level", ["layer", "block"])
def test_a_stack_scores_as_its_layers_written_out(two_llamas, level):
    fn, params, plain, like, inputs = two_llamas
    first = structured.block_influence(fn, params, [inputs], level=level)
    second = structured.block_influence(plain, like, [inputs], level=level)
    rename = lambda name: name.replace("layers[", "layers_").replace("]", "")
    if level == "layer":
        assert [f"params/{rename(name)}" for name in first] == list(second)
        np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=1e-5)
    else:
        for name, score in first.items():
            base, k = name[:-1].split("[")
            twin = base.replace("layers", f"params/layers_{k}")
            assert score == pytest.approx(second[twin], rel=1e-5)


def test_influence_of_zeros_and_other_axes():
    assert structured.influence(jnp.zeros((2, 3)), jnp.zeros((2, 3))) == 0
    assert structured.influence(jnp.zeros((1, 3)), jnp.ones((1, 3))) == 1
    assert structured.influence(jnp.ones((1, 3)), -jnp.ones((1, 3))) == pytest.approx(2)
    huge = jnp.full((1, 2), 1e30, jnp.bfloat16)
    assert structured.influence(huge, huge) == pytest.approx(0, abs=1e-6)
    x, y = draw(0, 3, 4), draw(1, 3, 4)
    across = structured.influence(x.T, y.T, axis=0)
    np.testing.assert_allclose(across, turn(np.asarray(x), np.asarray(y)).mean(), rtol=1e-5)


def test_influence_needs_batches_blocks_and_numbers():
    with pytest.raises(ArgumentError, match="no batches"):
        structured.block_influence(unrolled, unrolled_params(), [])
    with pytest.raises(ArgumentError, match="without residual blocks"):
        structured.block_influence(lambda p, x: x @ p, jnp.eye(4), [X])
    with pytest.raises(ArgumentError, match="'layer' or 'block'"):
        structured.block_influence(unrolled, unrolled_params(), [X], level="blocks")
    with pytest.raises(NonFiniteError, match="'layer_0'"):
        structured.block_influence(unrolled, unrolled_params(), [jnp.full((2, 4), jnp.nan)])


# --- the change of a loss -------------------------------------------------------------------------


def squares(outputs, x, target):
    return ((outputs - target) ** 2).mean(-1)


def loop_loss(gone):
    """The mean loss over all examples without one layer, by NumPy."""
    params, values = unrolled_params(), []
    for x, target in zip(BATCHES, TARGETS, strict=True):
        y = np.asarray(x, np.float64)
        for k in range(3):
            p = {n: np.asarray(leaf, np.float64) for n, leaf in params[f"layer_{k}"].items()}
            y = y if k == gone else y + np.tanh(y @ p["up"]) @ p["down"]
        y = y @ np.asarray(params["head"], np.float64)
        values.append(((y - np.asarray(target)) ** 2).mean(-1))
    return np.concatenate(values).mean()


@pytest.mark.parametrize("stacked", [False, True])
def test_loss_change_is_that_of_a_loop(stacked):
    fn, params = (scanned, stacked_params()) if stacked else (unrolled, unrolled_params())
    batches = zip(BATCHES, TARGETS, strict=True)
    found = structured.loss_change(fn, params, batches, squares)
    expected = [loop_loss(k) - loop_loss(None) for k in range(3)]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-4, atol=1e-6)


def test_loss_change_of_branches_in_a_stack(two_llamas):
    fn, params, plain, like, (tokens,) = two_llamas
    loss = lambda outputs, tokens: optax.softmax_cross_entropy_with_integer_labels(outputs, tokens)
    first = structured.loss_change(fn, params, [tokens], loss, level="block")
    second = structured.loss_change(plain, like, [tokens], loss, level="block")
    assert len(first) == len(second) == 4
    for name, change in first.items():
        base, k = name[:-1].split("[")
        assert change == pytest.approx(
            second[base.replace("layers", f"params/layers_{k}")], abs=1e-5
        )


def test_loss_change_needs_inputs():
    with pytest.raises(ArgumentError, match="from 1 to 2"):
        structured.loss_change(unrolled, unrolled_params(), [(X, X)], squares, inputs=3)
    with pytest.raises(ArgumentError, match="no batches"):
        structured.loss_change(unrolled, unrolled_params(), [], squares)


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["layer", "block"])
@pytest.mark.parametrize("name", ["llama_scanned", "encoder_decoder"])
def test_gates_of_one_change_nothing(name, level):
    fn, params, inputs = ZOO[name].build()
    gated, with_gates = structured.gate(fn, params, *inputs, level=level)
    found = jax.jit(gated)(with_gates, *inputs)
    np.testing.assert_array_equal(found, jax.jit(fn)(params, *inputs))
    count = {"llama_scanned": (2, 4), "encoder_decoder": (2, 5)}[name][level == "block"]
    assert len(structured.gate_scores(with_gates)) == count


@pytest.mark.parametrize("stacked", [False, True])
def test_gates_multiply_branches(stacked):
    fn, params = (scanned, stacked_params()) if stacked else (unrolled, unrolled_params())
    gated, with_gates = structured.gate(fn, params, X)
    values = [0.5, 0.0, -2.0]

    def by_hand(values, x):
        for k, g in enumerate(values):
            p = unrolled_params()[f"layer_{k}"]
            x = x + g * (jnp.tanh(x @ p["up"]) @ p["down"])
        return x @ params["head"]

    def set_gates(values):
        if stacked:
            return {"gates": {"layers": jnp.asarray(values)}, "params": params}
        names = {f"layer_{k}": jnp.asarray(g) for k, g in enumerate(values)}
        return {"gates": names, "params": params}

    assert jax.tree.structure(set_gates(values)) == jax.tree.structure(with_gates)
    np.testing.assert_allclose(gated(set_gates(values), X), by_hand(values, X), rtol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(gated(p, X) ** 2))(set_gates(values))["gates"]
    expected = jax.grad(lambda v: jnp.sum(by_hand(v, X) ** 2))(jnp.asarray(values))
    found = grads["layers"] if stacked else [grads[f"layer_{k}"] for k in range(3)]
    np.testing.assert_allclose(jnp.stack(list(found)), expected, rtol=1e-4)


def test_a_useless_layer_is_found_by_training_gates_and_dropped():
    params = unrolled_params()
    params["layer_1"]["down"] = jnp.zeros((3, 4))  # does nothing for the targets
    target = unrolled(params, X)
    params["layer_1"]["down"] = draw(3, 3, 4) / 20
    gated, trained = structured.gate(unrolled, params, X)
    tx = optax.chain(
        optax.masked(optax.set_to_zero(), {"gates": False, "params": True}),
        optax.sgd(0.05),
        structured.sparse_gates(0.0005),
    )
    loss = lambda p: jnp.mean((gated(p, X) - target) ** 2)

    @jax.jit
    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (trained, tx.init(trained)), length=3000)
    scores = structured.gate_scores(trained)
    assert scores["layer_1"] == 0.0 and min(scores["layer_0"], scores["layer_2"]) > 0.3
    chosen = structured.choose_layers(unrolled, params, scores, X, budget=1)
    assert chosen == ("layer_1",)
    # In the gated function itself, whose other gates stay as they were trained.
    smaller, fewer, certificate = structured.drop_layers(gated, trained, "params/layer_1", X)
    assert certificate.holds and set(fewer["gates"]) == {"layer_0", "layer_2"}
    np.testing.assert_allclose(smaller(fewer, X), gated(trained, X), rtol=1e-5, atol=1e-6)


def test_sparse_gates_is_the_proximal_step():
    tx = structured.sparse_gates(lambda step: 0.1 * (step + 1), where="gates/*")
    params = {"gates": {"a": jnp.array([1.0, -0.05, 0.2])}, "other": jnp.array([1.0])}
    updates = {"gates": {"a": jnp.array([0.0, 0.0, 0.05])}, "other": jnp.array([0.5])}
    state = tx.init(params)
    first, state = tx.update(updates, state, params)
    np.testing.assert_allclose(first["gates"]["a"], [-0.1, 0.05, -0.05], rtol=1e-5)
    np.testing.assert_array_equal(first["other"], [0.5])
    second, state = tx.update(updates, state, params)
    np.testing.assert_allclose(second["gates"]["a"], [-0.2, 0.05, -0.15], rtol=1e-5)
    assert state.step == 2
    with pytest.raises(ArgumentError, match="at least 0"):
        structured.sparse_gates(-1.0)
    with pytest.raises(ArgumentError, match="`strength`"):
        structured.sparse_gates(jnp.inf)
    injected = optax.inject_hyperparams(structured.sparse_gates)(strength=0.25)
    gates = {"gates": {"a": jnp.float32(1.0)}}
    updates, _ = jax.jit(injected.update)(
        jax.tree.map(jnp.zeros_like, gates), injected.init(gates), gates
    )
    assert updates["gates"]["a"] == -0.25
    with pytest.raises(SelectionError, match="matches none"):
        structured.sparse_gates(0.1).init({"w": jnp.ones(2)})
    with pytest.raises(ArgumentError, match="params that the updates are for"):
        tx.update(updates, state)


def test_gate_scores_need_gates():
    with pytest.raises(ArgumentError, match="gated function"):
        structured.gate_scores({"w": jnp.ones(2)})
    with pytest.raises(NonFiniteError):
        structured.gate_scores({"gates": {"a": jnp.float32("nan")}, "params": {}})


# --- choosing -------------------------------------------------------------------------------------

SCORES = {"layer_0": 0.3, "layer_1": 0.1, "layer_2": 0.2}
STACK = {f"layers[{k}]": score for k, score in enumerate(SCORES.values())}
PARAMS, LAYER = 3 * 24 + 8, 24  # each layer has 12 + 12 entries, the head 8


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (0, 0),
        (2, 2),
        (Params(1.0), 0),
        (Params(PARAMS - 1), 1),
        (Params(PARAMS - LAYER), 1),
        (Params(PARAMS - LAYER - 1), 2),
        (Bytes(4 * (PARAMS - LAYER)), 1),
        (Flops(2 * 5 * (LAYER + 8)), 2),
        (Flops(0.99), 1),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_fewest_layers_that_meet_a_budget(budget, count, stacked):
    fn, make, scores, names = (
        (scanned, stacked_params, STACK, ["layers[1]", "layers[2]"])
        if stacked
        else (unrolled, unrolled_params, SCORES, ["layer_1", "layer_2"])
    )
    shapes = jax.eval_shape(make)
    chosen = structured.choose_layers(fn, shapes, scores, X, budget=budget)
    assert list(chosen) == names[:count]
    if count and not isinstance(budget, int):
        smaller, fewer, certificate = structured.drop_layers(fn, shapes, chosen, X)
        measured = {
            Params: tree.count(fewer),
            Bytes: tree.nbytes(fewer),
            Flops: graph.trace(smaller, fewer, X).flops,
        }[type(budget)]
        before = certificate.before
        total = {Params: before.params, Bytes: before.bytes, Flops: before.flops}[type(budget)]
        assert measured <= budget.limit(total)


def test_seconds_where_no_compiler_estimates_them():
    budget = Seconds(0.9, target="cpu")
    with pytest.raises(ArgumentError, match="gives no estimate"):
        structured.choose_layers(unrolled, unrolled_params(), SCORES, X, budget=budget)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="its plugin is absent")
def test_seconds_come_from_the_compiler():
    wide = {"up": jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16)}
    wide["down"] = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16)
    params = {f"layer_{k}": wide for k in range(3)}
    params["head"] = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    chosen = structured.choose_layers(unrolled, params, SCORES, x, budget=Seconds(0.75))
    assert chosen == ("layer_1",)


def test_budgets_that_cannot_be_met():
    choose = lambda **kw: structured.choose_layers(unrolled, unrolled_params(), SCORES, X, **kw)
    with pytest.raises(ArgumentError, match=f"at least {PARAMS - 2 * LAYER}"):
        choose(budget=Params(10))
    with pytest.raises(ArgumentError, match="from 0 to 2"):
        choose(budget=3)
    with pytest.raises(ArgumentTypeError, match=r"got 0\.5"):
        choose(budget=0.5)
    with pytest.raises(SelectionError, match="'layer_9'"):
        structured.choose_layers(unrolled, unrolled_params(), {"layer_9": 1.0}, X, budget=1)
    with pytest.raises(NonFiniteError):
        bad = {**SCORES, "layer_0": float("nan")}
        structured.choose_layers(unrolled, unrolled_params(), bad, X, budget=1)


def test_scores_to_smaller_function(two_llamas):
    """The whole way: score, choose, drop."""
    fn, params, _, _, inputs = two_llamas
    scores = structured.block_influence(fn, params, [inputs])
    chosen = structured.choose_layers(fn, params, scores, *inputs, budget=Params(0.9))
    assert chosen == (min(scores, key=lambda name: scores[name]),)
    assert layer(X, unrolled_params()["layer_0"]).shape == X.shape
