"""Regularisers of units against loops over entries, closed forms and optax's own contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import (
    HEAD_GROUPS,
    HEADS,
    MLP,
    MLP_GROUPS,
    STACK,
    STACK_GROUPS,
    entries,
    group,
    member,
    normal,
)
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import adapters, errors, structured, tree

SCORES = {
    "hidden": np.array([[3.0, 1.0, 2.0, 0.5], [0.0, 0.0, 0.0, 1.0]]),
    "stream": np.arange(3.0),
}


def step(tx, params, grads=None, state=None):
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates), state


def prox(leaf_of, members, threshold):
    """The proximal point of the units of one group without layers, unit by unit, in place."""
    for unit in range(len(members[0].indices)):
        where = [
            (m.path, tuple(m.indices[unit] if k == m.axis else slice(None) for k in range(8)))
            for m in members
        ]
        where = [(path, index[: leaf_of[path].ndim]) for path, index in where]
        total = sum(np.square(leaf_of[path][index]).sum() for path, index in where)
        count = sum(leaf_of[path][index].size for path, index in where)
        factor = max(0.0, 1 - threshold * np.sqrt(count) / np.sqrt(total))
        for path, index in where:
            leaf_of[path][index] *= factor


# --- Group lasso ----------------------------------------------------------------------------------


def test_group_lasso_is_the_proximal_step_over_all_members():
    grads = jax.tree.map(lambda p: 0.1 * jnp.cos(p), MLP)
    tx = optax.chain(optax.sgd(0.1), structured.group_lasso(MLP_GROUPS, 3.0, learning_rate=0.1))
    found, _ = step(tx, MLP, grads)
    wanted = {p: np.array(x, np.float64) for p, x in tree.items(MLP)}
    for path, g in tree.items(grads):
        wanted[path] -= 0.1 * np.asarray(g)
    learned = [m for m in MLP_GROUPS["up"].members if m.path.startswith("params")]
    assert len(learned) == 5
    prox(wanted, learned, 0.3)
    for path, x in tree.items(found):
        np.testing.assert_allclose(x, wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)
    # The statistics and the layer's own bias are no part of a unit.
    assert np.any(wanted["params/up/kernel"] != 0)


def test_groups_that_overlap_are_taken_in_turn_and_layers_apart():
    tx = structured.group_lasso(STACK_GROUPS, 1.5, learning_rate=0.2)
    found, _ = step(tx, STACK)
    wanted = {path: np.array(x, np.float64) for path, x in STACK.items()}
    for layer in range(2):
        one = {path: x[layer] for path, x in wanted.items()}
        prox(one, [member("up", 1, 4), member("bias", 0, 4), member("down", 0, 4)], 0.3)
    prox(wanted, STACK_GROUPS["stream"].members, 0.3)
    for path, x in found.items():
        np.testing.assert_allclose(x, wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_training_ends_at_the_closed_form():
    """Of |w - a|^2 / 2 the minimum is a shrunk a, unit by unit: a fixed point of the chain."""
    a = {"value": normal(3, 4) * jnp.array([1.0, 1.0, 0.1, 0.1]), "out": normal(2, 2, 3)}
    a["out"] = a["out"].at[1].multiply(0.1)
    tx = optax.chain(optax.sgd(0.5), structured.group_lasso(HEAD_GROUPS, 0.3, learning_rate=0.5))

    @jax.jit
    def train(params):
        def body(_, carry):
            params, state = carry
            grads = jax.tree.map(jnp.subtract, params, a)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 100, body, (params, tx.init(params)))

    params, state = train(HEADS)
    wanted = {path: np.array(x, np.float64) for path, x in a.items()}
    prox(wanted, HEAD_GROUPS["value"].members, 0.3)
    for path, x in params.items():
        np.testing.assert_allclose(x, wanted[path], rtol=1e-4, atol=1e-6)
    assert not np.any(params["out"][1]) and not np.any(params["value"][:, 2:])  # exactly
    assert np.all(params["out"][0] != 0) and int(state[1].step) == 100


@pytest.mark.parametrize("of_params", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("of_grads", [jnp.float32, jnp.bfloat16])
def test_units_are_exactly_zero_in_any_dtype(of_params, of_grads):
    params = jax.tree.map(lambda p: p.astype(of_params), HEADS)
    grads = jax.tree.map(lambda p: jnp.cos(p).astype(of_grads), HEADS)
    tx = optax.chain(optax.sgd(0.1), structured.group_lasso(HEAD_GROUPS, 9.0, learning_rate=1.0))
    found, _ = step(tx, params, grads)
    for x in found.values():
        assert x.dtype == of_params and not np.any(x)


def test_strength_and_learning_rate_follow_schedules():
    members = {"w": group("w", 2, member("w", 0, 2))}
    params = {"w": jnp.array([4.0, -2.0])}
    tx = structured.group_lasso(
        members, lambda step: step + 1, learning_rate=optax.linear_schedule(0.5, 0.25, 1)
    )
    params, state = step(tx, params)
    np.testing.assert_allclose(params["w"], [3.5, -1.5])
    params, _ = step(tx, params, state=state)  # 2 * 0.25
    np.testing.assert_allclose(params["w"], [3.0, -1.0])


def test_units_of_zeros_stay_and_no_strength_changes_nothing():
    params = {**HEADS, "value": HEADS["value"].at[:, :2].set(0), "out": HEADS["out"].at[0].set(0)}
    for strength in (0.0, 0.1):
        found, _ = step(structured.group_lasso(HEAD_GROUPS, strength, learning_rate=1.0), params)
        assert not np.any(found["out"][0])
        same = np.array_equal(found["out"][1], params["out"][1])
        assert same == (strength == 0)


# --- Scales ---------------------------------------------------------------------------------------


def test_scale_l1_adds_the_sign():
    scale = jnp.array([0.5, -2.0, 0.0, 1.0])
    params = {**MLP, "params": {**MLP["params"], "norm": {**MLP["params"]["norm"], "scale": scale}}}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = structured.scale_l1(MLP_GROUPS, optax.constant_schedule(0.25))
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["params"]["norm"]["scale"], [1.25, 0.75, 1.0, 1.25])
    others = [x for path, x in tree.items(updates) if path != "params/norm/scale"]
    assert all(np.all(x == 1) for x in others) and int(state.step) == 1


def test_a_scale_in_two_groups_is_penalised_once_and_only_where_units_are():
    params = {"s": jnp.ones(4)}
    several = {
        "a": group("a", 2, member("s", 0, 2)),
        "b": group("b", 2, member("s", 0, 2, offset=1)),
    }
    tx = structured.scale_l1(several, 0.5, where="s")
    updates, _ = tx.update({"s": jnp.zeros(4)}, tx.init(params), params)
    np.testing.assert_allclose(updates["s"], [0.5, 0.5, 0.5, 0.0])


# --- Growing regularisation -----------------------------------------------------------------------


def test_the_penalty_of_the_lowest_units_grows_to_a_ceiling():
    tx = structured.growing_regularization(
        STACK_GROUPS, SCORES, fraction=0.5, increment=0.1, every=2, ceiling=0.25
    )
    grads, state = jax.tree.map(jnp.ones_like, STACK), tx.init(STACK)
    update = jax.jit(tx.update)
    # Half of four, of each layer, ties by index; of three units one.
    hidden = np.array([[0, 1, 0, 1], [1, 1, 0, 0]])
    stream = np.array([1, 0, 0])
    for penalty in (0.1, 0.1, 0.2, 0.2, 0.25, 0.25):
        updates, state = update(grads, state, STACK)
        np.testing.assert_allclose(state.penalties["hidden"], penalty * hidden, rtol=1e-6)
        np.testing.assert_allclose(state.penalties["stream"], penalty * stream, rtol=1e-6)
        # An entry that two of the units meet in is penalised for both.
        both = hidden[:, None, :] + stream[None, :, None]
        wanted = 1 + penalty * both * np.asarray(STACK["up"])
        np.testing.assert_allclose(updates["up"], wanted, rtol=1e-5)
        wanted = 1 + penalty * hidden * np.asarray(STACK["bias"])
        np.testing.assert_allclose(updates["bias"], wanted, rtol=1e-5)


def test_growing_units_vanish_and_the_others_stay():
    only = {"hidden": STACK_GROUPS["hidden"]}
    tx = optax.chain(
        structured.growing_regularization(
            only, SCORES, fraction={"hidden": 0.25}, increment=0.1, every=1
        ),
        optax.sgd(0.5),
    )

    def body(_, carry):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    start = (STACK, tx.init(STACK))
    params, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 60, body, c))(start)
    assert np.abs(params["up"][0, :, 3]).max() < 1e-6 * np.abs(STACK["up"]).max()
    np.testing.assert_array_equal(params["up"][0, :, :3], STACK["up"][0, :, :3])


# --- All three ------------------------------------------------------------------------------------

ALL = {
    "group_lasso": lambda groups: structured.group_lasso(groups, 0.1, learning_rate=0.5),
    "scale_l1": lambda groups: structured.scale_l1(groups, 0.1, where="**"),
    "growing": lambda groups: structured.growing_regularization(
        groups, {n: np.zeros((*g.layers, g.size)) for n, g in groups.items()}, fraction=0.5
    ),
}


@pytest.fixture(params=ALL)
def make(request):
    return ALL[request.param]


def test_params_are_required_and_must_be_those_of_the_groups(make):
    tx = make(HEAD_GROUPS)
    with pytest.raises(errors.ArgumentError, match="params"):
        tx.update(HEADS, tx.init(HEADS))
    with pytest.raises(errors.ArgumentError, match="learns"):
        tx.init({"other": jnp.ones(3)})
    with pytest.raises(errors.StructureError, match="axes"):
        tx.init({**HEADS, "out": jnp.ones(())})


def test_jit_states_of_arrays_and_extra_arguments(make):
    tx = optax.with_extra_args_support(make(STACK_GROUPS))
    grads = jax.tree.map(jnp.cos, STACK)
    state = tx.init(STACK)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    plain, after = tx.update(grads, state, STACK)
    fast, again = jax.jit(tx.update)(grads, state, STACK, value=jnp.ones(()))
    for a, b in zip(jax.tree.leaves((plain, after)), jax.tree.leaves((fast, again)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(plain) == jax.tree.structure(grads)


def test_strict_promotion(make, strict_promotion):
    tx = make(STACK_GROUPS)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), STACK)
    for params, grads in ((STACK, half), (half, STACK)):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))


def test_nnx_states_and_leaves_that_the_optimizer_does_not_see(make):
    _, params = adapters.from_nnx(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    groups = {"l": group("l", 4, member("kernel", 1, 4, kind="p"), member("bias", 0, 4))}
    tx = make(groups)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert np.any(np.asarray(updates["kernel"][...]) != 1)
    part, _ = tree.partition(MLP, "params/up/*")
    tx = make(MLP_GROUPS)
    updates, _ = tx.update(part, tx.init(part), part)
    assert tree.paths(updates) == ["params/up/bias", "params/up/kernel"]


def test_explicit_meshes(make):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    specs = {"up": (None, None, "x"), "bias": (None, "x"), "down": (None, "x", None)}
    tx = make(STACK_GROUPS)
    plain, _ = tx.update(STACK, tx.init(STACK), STACK)
    with jax.set_mesh(mesh):
        split = {
            path: jax.device_put(p, NamedSharding(mesh, PartitionSpec(*specs[path])))
            for path, p in STACK.items()
        }
        updates, _ = jax.jit(tx.update)(split, tx.init(split), split)
    for path, x in updates.items():
        assert x.sharding.is_equivalent_to(split[path].sharding, x.ndim)
        np.testing.assert_allclose(x, plain[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: structured.group_lasso(MLP_GROUPS, -1.0, learning_rate=0.1), ValueError),
        (lambda: structured.group_lasso(MLP_GROUPS, 1.0, learning_rate=np.nan), ValueError),
        (lambda: structured.scale_l1(MLP_GROUPS, -1.0), ValueError),
        (lambda: growing(every=0), errors.ArgumentError),
        (lambda: growing(increment=-1.0), errors.ArgumentError),
        (lambda: growing(fraction=1.5), errors.ArgumentError),
        (lambda: growing(fraction=0.1), errors.ArgumentError),
        (lambda: growing(fraction={"none": 0.5}), errors.ArgumentError),
        (lambda: growing(scores={}), errors.StructureError),
        (lambda: growing(scores=SCORES | {"stream": np.ones(4)}), errors.StructureError),
        (lambda: growing(scores=SCORES | {"stream": np.full(3, np.nan)}), errors.NonFiniteError),
    ],
)
def test_what_is_refused(make, kind):
    with pytest.raises(kind):
        make()


def growing(scores=SCORES, fraction=0.5, **kwargs):
    return structured.growing_regularization(STACK_GROUPS, scores, fraction=fraction, **kwargs)


def test_a_group_without_scales_is_named():
    with pytest.raises(errors.ArgumentError, match="'hidden'"):
        structured.scale_l1({"hidden": STACK_GROUPS["hidden"]}, 0.1).init(STACK)


def test_entries_reads_units():
    """The loop that the tests of scores trust: the columns of a kernel, layer by layer."""
    (first, *_), _ = entries(STACK, STACK_GROUPS["hidden"].members[0])
    np.testing.assert_array_equal(first[:, 0], np.asarray(STACK["up"], np.float64)[0, :, 0])
