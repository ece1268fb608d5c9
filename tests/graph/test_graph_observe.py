"""Taps, observers and offsets: against the same values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxcompress import graph
from jaxcompress.errors import ArgumentError, SelectionError, StructureError

X = jax.random.normal(jax.random.key(1), (2, 4))
W = {"w": jax.random.normal(jax.random.key(0), (4, 4)) / 2}
STACKED = {"w": jax.random.normal(jax.random.key(0), (3, 4, 4)) / 2}


def scanned(p, x):
    return lax.scan(lambda c, w: (jax.checkpoint(jnp.tanh)(c @ w), None), x, p["w"])[0]


def layers(x=X):
    """The inputs of the three layers, in NumPy."""
    inputs = [np.asarray(x)]
    for w in np.asarray(STACKED["w"]):
        inputs.append(np.tanh(inputs[-1] @ w))
    return inputs


def count(site, state, activation, output):
    return state + 1


def energy(site, state, activation, output):
    return state + (activation**2).sum() + 100 * (output**2).sum()


# --- tap ---------------------------------------------------------------------------------------


def test_taps_of_a_scan_are_stacked():
    for side in ("input", "output"):
        outputs, taps = jax.jit(graph.tap(scanned, "w", at=side))(STACKED, X)
        wanted = (
            layers()[:3]
            if side == "input"
            else [a @ w for a, w in zip(layers()[:3], STACKED["w"], strict=True)]
        )
        np.testing.assert_allclose(taps["w"], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(outputs, jax.jit(scanned)(STACKED, X))


def test_a_reversed_scan_is_stacked_in_the_order_of_its_weights():
    fn = lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"], reverse=True)[0]
    taps = graph.tap(fn, "w", at="input")(STACKED, X)[1]["w"]
    np.testing.assert_array_equal(taps[2], X)
    np.testing.assert_allclose(taps[1], X @ STACKED["w"][2], rtol=1e-5, atol=1e-6)


def test_a_branch_not_taken_gives_zeros():
    fn = lambda p, i, x: lax.switch(i, [lambda x: x @ p["a"], lambda x: x @ p["b"], lambda x: x], x)
    params = {"a": W["w"], "b": 2 * W["w"]}
    for index, name in enumerate("ab"):
        taps = jax.jit(graph.tap(fn, "*"))(params, index, X)[1]
        np.testing.assert_allclose(taps[name], X @ params[name], rtol=1e-5)
        np.testing.assert_array_equal(taps["b" if name == "a" else "a"], jnp.zeros((2, 4)))


def test_a_while_loop_gives_its_last_iteration():
    fn = lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x)
    )[1]
    outputs, taps = graph.tap(fn, "w")(W, X)
    np.testing.assert_allclose(jnp.tanh(taps["w"]), outputs, rtol=1e-6)


def test_gradients_flow_through_taps():
    def loss(tapped, params):
        return (tapped(params, X)[1]["w"] ** 2).sum()

    gradient = jax.grad(lambda p: loss(graph.tap(scanned, "w"), p))(STACKED)["w"]

    def by_hand(params):
        x, squares = X, 0.0
        for w in params["w"]:
            squares += ((x @ w) ** 2).sum()
            x = jnp.tanh(x @ w)
        return squares

    np.testing.assert_allclose(gradient, jax.grad(by_hand)(STACKED)["w"], rtol=1e-4, atol=1e-5)


def test_taps_inside_a_custom_rule_leave_its_gradient_alone():
    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (3 * g @ r[1].T, r[0].T @ g))
    fn = lambda p, x: dense(x, p["w"])
    tapped = graph.tap(fn, "w")
    np.testing.assert_allclose(tapped(W, X)[1]["w"], X @ W["w"], rtol=1e-6)
    gradient = jax.grad(lambda x: tapped(W, x)[0].sum())(X)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: fn(W, x).sum())(X))


def test_taps_of_a_lookup_and_under_vmap():
    fn = lambda p, tokens: p["e"][tokens] @ p["e"].T
    params, tokens = (
        {"e": jax.random.normal(jax.random.key(0), (5, 3))},
        jnp.array([[1, 4], [0, 2]]),
    )
    taps = jax.vmap(graph.tap(fn, "e", at="input"), in_axes=(None, 0))(params, tokens)[1]
    np.testing.assert_array_equal(taps["e"][..., 0], tokens)
    np.testing.assert_array_equal(taps["e#1"], params["e"][tokens])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_taps_of_a_shard_map_have_a_device_axis(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    split = PartitionSpec("data")
    x = jax.random.normal(jax.random.key(2), (8, 4))

    def fn(p, x):
        specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}
        return jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=mesh, **specs)(p["w"], x)

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, split))
        w = {"w": jax.device_put(W["w"], jax.NamedSharding(mesh, PartitionSpec()))}
        taps = jax.jit(graph.tap(fn, "w"))(w, placed)[1]["w"]
    np.testing.assert_allclose(np.asarray(taps).reshape(8, 4), x @ W["w"], rtol=1e-5, atol=1e-6)


# --- observe -----------------------------------------------------------------------------------


def test_states_are_kept_per_iteration_and_add_up_over_calls():
    observed = jax.jit(graph.observe(scanned, {"w": energy}))
    states = {"w": jnp.zeros(3)}
    for _ in range(2):
        outputs, states = observed(STACKED, states, X)
    inputs = layers()
    outs = [a @ w for a, w in zip(inputs, np.asarray(STACKED["w"]), strict=False)]
    wanted = [2 * ((a**2).sum() + 100 * (y**2).sum()) for a, y in zip(inputs, outs, strict=False)]
    np.testing.assert_allclose(states["w"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(outputs, jax.jit(scanned)(STACKED, X))


def test_states_in_loops_and_branches():
    def fn(p, x):
        x = lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ p["loop"]), (0, x))[1]
        return lax.cond(x.sum() < jnp.inf, lambda x: x @ p["taken"], lambda x: x @ p["not"], x)

    params = {"loop": W["w"], "taken": W["w"], "not": W["w"]}
    observed = graph.observe(fn, dict.fromkeys(params, count))
    states = observed(params, {"loop": 0, "taken": 7, "not": 7}, X)[1]
    assert {name: int(state) for name, state in states.items()} == {
        "loop": 5,
        "taken": 8,
        "not": 7,
    }


def test_a_state_may_be_any_tree():
    def both(site, state, activation, output):
        return {"n": state["n"] + 1, "last": output}

    observed = graph.observe(scanned, {"w": both})
    states = {"w": {"n": jnp.zeros(3), "last": jnp.zeros((3, 2, 4))}}
    states = jax.jit(observed)(STACKED, states, X)[1]["w"]
    np.testing.assert_array_equal(states["n"], [1, 1, 1])
    np.testing.assert_allclose(states["last"][0], X @ STACKED["w"][0], rtol=1e-5, atol=1e-6)


def test_observers_of_ragged_experts_see_their_own_tokens():
    sizes = jnp.array([3, 0, 1])
    x = jax.random.normal(jax.random.key(3), (4, 2))
    params = {"w": jax.random.normal(jax.random.key(4), (3, 2, 5))}
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)

    def gram(site, state, activation, output):
        rows, outs = site.rows(activation), site.output_rows(output)
        return state + jnp.einsum("eti,eto->eio", rows, outs)

    got = graph.observe(fn, {"w": gram})(params, {"w": jnp.zeros((3, 2, 5))}, x)[1]["w"]
    y = fn(params, x)
    wanted = [x[:3].T @ y[:3], jnp.zeros((2, 5)), x[3:].T @ y[3:]]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# --- perturb -----------------------------------------------------------------------------------


def test_gradients_of_offsets_are_gradients_of_activations():
    offsets = {"w": jnp.zeros((3, 2, 4))}
    loss = lambda offsets: (graph.perturb(scanned, "w")(STACKED, offsets, X) ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(offsets)["w"]

    def by_hand(offset):
        x = X
        for w, e in zip(STACKED["w"], offset, strict=True):
            x = jnp.tanh(x @ w + e)
        return (x**2).sum()

    np.testing.assert_allclose(gradient, jax.grad(by_hand)(offsets["w"]), rtol=1e-4, atol=1e-6)


def test_offsets_of_inputs_and_of_some_sites_only():
    fn = lambda p, x: x @ p["a"] @ p["b"]
    params = {"a": W["w"], "b": W["w"]}
    out = graph.perturb(fn, "*", at="input")(params, {"b": jnp.ones((2, 4))}, X)
    np.testing.assert_allclose(out, (X @ params["a"] + 1) @ params["b"], rtol=1e-5, atol=1e-6)


# --- what cannot be reached --------------------------------------------------------------------


def test_the_condition_of_a_loop_is_refused():
    fn = lambda p, x: lax.while_loop(lambda c: (c @ p["w"]).sum() < 0, lambda c: c, x)
    with pytest.raises(ArgumentError, match="condition of a loop"):
        graph.tap(fn, "w")(W, X)


def test_offsets_inside_custom_rules_are_refused():
    dense = jax.custom_vjp(lambda x, w: x @ w)
    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    with pytest.raises(ArgumentError, match="inside custom_vjp"):
        graph.perturb(lambda p, x: dense(x, p["w"]), "w")(W, {"w": jnp.zeros((2, 4))}, X)


def test_bad_input_is_named():
    fn = lambda p, x: x @ p["w"]
    with pytest.raises(SelectionError, match="leaves with sites are: 'w'"):
        graph.tap(fn, "**/kernel")(W, X)
    with pytest.raises(SelectionError, match="contracts none of its params"):
        graph.tap(lambda p, x: x, "w")(W, X)
    with pytest.raises(ArgumentError, match="at"):
        graph.tap(fn, "w", at="middle")
    with pytest.raises(SelectionError, match="'v'"):
        graph.observe(fn, {"v": count})(W, {"v": 0}, X)
    with pytest.raises(StructureError, match="states"):
        graph.observe(fn, {"w": count})(W, {}, X)
    with pytest.raises(StructureError, match=r"leading axes \(3,\)"):
        graph.observe(scanned, {"w": count})(STACKED, {"w": jnp.zeros(())}, X)
    with pytest.raises(StructureError, match=r"shape \(3, 2, 4\)"):
        graph.perturb(scanned, "w")(STACKED, {"w": jnp.zeros((2, 4))}, X)
    with pytest.raises(StructureError, match="offsets"):
        graph.perturb(fn, "w")(W, {"w#1": X}, X)
