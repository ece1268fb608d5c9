"""`sparsify`: exactly masked params around and inside optax, and what it must refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import errors, sparsity
from jaxcompress.sparsity import NM, Block, Channel, Unstructured, schedules, sparsify

INNER = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "muon": optax.contrib.muon(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4, weight_decay_rate=0.1),
}


def new_params(dtype=jnp.float32):
    w = np.random.default_rng(0).normal(size=(8, 6))
    return {"kernel": jnp.asarray(w, dtype), "bias": jnp.ones(6, dtype)}


def loss(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"] - 1) ** 2)


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)


def train(tx, steps, params=None, jit=True, grads_dtype=None):
    """Train a few steps; gives the params after each, and the last state."""
    params = new_params() if params is None else params
    state, seen = tx.init(params), []

    def step(params, state):
        grads = jax.grad(loss)(params, X.astype(params["kernel"].dtype))
        if grads_dtype is not None:
            grads = jax.tree.map(lambda g: g.astype(grads_dtype), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(params)
    return seen, state


def assert_masked(params, mask, sparsity_):
    kernel, m = np.asarray(params["kernel"].astype(jnp.float32)), np.asarray(mask["kernel"])
    assert mask["bias"] is None and (params["bias"] != 1).any()
    assert (~m).sum() == round(sparsity_ * m.size)
    assert (kernel[~m] == 0).all() and (kernel[m] != 0).all()


@pytest.mark.parametrize("name", INNER)
def test_exactly_masked_around_every_optimizer(name):
    seen, state = train(sparsify(INNER[name], schedule=0.5, every=2), 3)
    for params in seen:
        assert_masked(params, sparsity.get_mask(state), 0.5)
    sparsity.check(seen[-1], state)


@pytest.mark.parametrize(
    ("p", "g"),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16),  # the naive rule leaves 99 % of the pruned entries non-zero
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.bfloat16),
    ],
)
def test_exactly_masked_in_every_dtype(p, g):
    # sgd keeps the gradient's dtype in its updates
    seen, state = train(sparsify(optax.sgd(0.1), schedule=0.5), 2, new_params(p), grads_dtype=g)
    assert seen[-1]["kernel"].dtype == p
    assert_masked(seen[-1], sparsity.get_mask(state), 0.5)


def test_the_inner_optimizer_sees_the_masked_model():
    """Sgd with momentum, step by step in NumPy."""
    seen, state = train(sparsify(optax.sgd(0.1, momentum=0.9), schedule=0.5), 3, jit=False)
    params, m = new_params(), np.asarray(sparsity.get_mask(state)["kernel"])
    p = {key: np.asarray(value) for key, value in params.items()}
    velocity = {key: np.zeros_like(value) for key, value in p.items()}
    for got in seen:
        grads = jax.grad(loss)(jax.tree.map(jnp.asarray, p), X)
        velocity["kernel"] = 0.9 * velocity["kernel"] + m * np.asarray(grads["kernel"])
        velocity["bias"] = 0.9 * velocity["bias"] + np.asarray(grads["bias"])
        p = {key: value - 0.1 * velocity[key] for key, value in p.items()}
        p["kernel"] = m * p["kernel"]
        for key in p:
            np.testing.assert_allclose(got[key], p[key], rtol=1e-5, atol=1e-6)


def test_follows_the_schedule_every_so_often():
    schedule = schedules.linear(0.75, end=6)
    seen, _ = train(sparsify(optax.sgd(1e-3), schedule=schedule, every=2), 9)
    got = [sparsity.sparsity_of(params).total for params in seen]
    wanted = [float(schedule(step - step % 2)) for step in range(9)]
    np.testing.assert_allclose(got, [round(s * 48) / 48 for s in wanted])
    gone = np.asarray(seen[2]["kernel"]) == 0  # pruned by magnitude: never comes back
    assert (np.asarray(seen[8]["kernel"])[gone] == 0).all()


def test_until_fixes_the_mask():
    schedule = schedules.linear(0.75, end=6)
    seen, _ = train(sparsify(optax.sgd(1e-3), schedule=schedule, every=2, until=3), 7)
    got = [sparsity.sparsity_of(params).total for params in seen]
    assert got[3:] == [18 / 48] * 4 and got[2] == 12 / 48  # step 3: 0.375, though 3 % 2


@pytest.mark.parametrize(
    "pattern", [Unstructured(), NM(2, 4), Block((2, 2)), Channel()], ids=lambda p: type(p).__name__
)
def test_matches_make_mask(pattern):
    """One rule for masks: what sparsify chooses at its first update is what make_mask would."""
    for score in (sparsity.magnitude(), sparsity.taylor(), sparsity.random(jax.random.key(0))):
        amount = None if isinstance(pattern, NM) else 0.5
        tx = sparsify(optax.sgd(0.1), schedule=amount, score=score, pattern=pattern)
        params = new_params()
        grads = jax.grad(loss)(params, X)
        _, state = tx.update(grads, tx.init(params), params)
        expected = sparsity.make_mask(
            params, sparsity=amount, score=score, pattern=pattern, grads=grads
        )
        np.testing.assert_array_equal(state.mask["kernel"], expected["kernel"])


def test_global_scope_and_within():
    params = {"a": jnp.full((4, 4), 5.0), "b": jnp.full((4, 4), 1.0)}
    within = {"a": jnp.ones((4, 4), bool).at[0].set(False), "b": None}
    tx = sparsify(optax.sgd(0.1), schedule=0.5, scope="global", within=within)
    state = tx.init(params)
    np.testing.assert_array_equal(state.mask["a"], within["a"])
    _, state = tx.update(params, state, params)
    np.testing.assert_array_equal(state.mask["a"], within["a"])  # its 4 zeros count
    assert int((~state.mask["b"]).sum()) == 12


def test_gradient_scores_accumulate_over_steps():
    tx = sparsify(optax.sgd(0.0), schedule=0.5, every=3, score=sparsity.movement())
    params = {"w": jnp.ones((2, 2))}
    state = tx.init(params)
    for g in ([[1.0, 2], [3, 4]], [[1.0, -9], [3, 4]]):
        _, state = tx.update({"w": jnp.array(g)}, state, params)
    np.testing.assert_allclose(state.scores["w"].mean, [[-1, 3.5], [-3, -4]])


# --- Inside optax's wrappers --------------------------------------------------------------------


def test_inside_multi_steps():
    tx = optax.MultiSteps(sparsify(optax.adamw(1e-2), schedule=0.5), every_k_schedule=2)
    seen, state = train(tx, 4)
    np.testing.assert_array_equal(seen[0]["kernel"], new_params()["kernel"])
    assert_masked(seen[1], sparsity.get_mask(state), 0.5)
    assert_masked(seen[3], sparsity.get_mask(state), 0.5)


def test_inside_apply_if_finite():
    tx = optax.apply_if_finite(sparsify(optax.adamw(1e-2), schedule=0.5), 3)
    seen, state = train(tx, 2)
    assert_masked(seen[-1], sparsity.get_mask(state), 0.5)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), seen[-1])
    updates, after = tx.update(bad, state, seen[-1])
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    assert int(after.inner_state.step) == int(state.inner_state.step) == 2


def test_with_inject_hyperparams_on_either_side():
    inside = sparsify(optax.inject_hyperparams(optax.adamw)(1e-2), schedule=0.5)
    seen, state = train(inside, 2)
    assert_masked(seen[-1], sparsity.get_mask(state), 0.5)
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == pytest.approx(1e-2)

    @optax.inject_hyperparams
    def outside(learning_rate, amount):
        return sparsify(optax.sgd(learning_rate), schedule=amount)

    tx = outside(1e-2, 0.25)
    seen, state = train(tx, 1)
    assert_masked(seen[-1], sparsity.get_mask(state), 0.25)
    state.hyperparams["amount"] = jnp.asarray(0.5)
    grads = jax.grad(loss)(seen[-1], X)
    updates, state = tx.update(grads, state, seen[-1])
    assert_masked(optax.apply_updates(seen[-1], updates), sparsity.get_mask(state), 0.5)


def test_inside_multi_transform():
    """Two partitions, each with its own sparsity; the masks are overlaid."""
    params = {"enc": new_params(), "head": new_params(), "rest": {"bias": jnp.ones(6)}}
    labels = {"enc": "high", "head": "low", "rest": "free"}
    tx = optax.multi_transform(
        {
            "high": sparsify(optax.adamw(1e-2), schedule=0.75),
            "low": sparsify(optax.sgd(1e-2), schedule=0.25),
            "free": optax.sgd(1e-2),
        },
        labels,
    )
    total = lambda p: loss(p["enc"], X) + loss(p["head"], X) + jnp.sum(p["rest"]["bias"])
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(total)(params), state, params)
        params = optax.apply_updates(params, updates)
    mask = sparsity.get_mask(state)
    assert_masked(params["enc"], mask["enc"], 0.75)
    assert_masked(params["head"], mask["head"], 0.25)
    assert mask["rest"] is None
    sparsity.check(params, state)
    jax.tree.map(np.testing.assert_array_equal, sparsity.apply(params, mask), params)


# --- State --------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [sparsity.fisher(), sparsity.random(jax.random.key(1))])
def test_state_is_arrays_that_survive_a_round_trip(score):
    tx = sparsify(optax.adam(1e-2), schedule=0.5, every=2, score=score)
    params = new_params()
    shapes = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    seen, state = train(tx, 1, params)
    leaves, treedef = jax.tree.flatten(state)
    restored = treedef.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
    assert state.mask["kernel"].dtype == bool
    grads = jax.grad(loss)(seen[-1], X)
    for _ in range(2):
        a, state = tx.update(grads, state, seen[-1])
        b, restored = tx.update(grads, restored, seen[-1])
    jax.tree.map(np.testing.assert_array_equal, (a, state), (b, restored))


SHARDED = {
    "taylor, global": {"score": sparsity.taylor(), "scope": "global"},
    "random": {"score": sparsity.random(jax.random.key(0))},
    "channel": {"pattern": Channel()},
    "block": {"pattern": Block((2, 2))},
    "n:m": {"pattern": NM(1, 2)},
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("options", SHARDED.values(), ids=SHARDED)
def test_sharded_equals_single_device(axis_type, options):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    tx = sparsify(optax.adam(1e-2), schedule=0.5, **options)
    params = {"kernel": new_params()["kernel"]}
    grads = {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(8, 6)), jnp.float32)}

    def one(params, grads):
        updates, state = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        got, state = jax.jit(one)(*jax.device_put((params, grads), sharding))
    expected, reference = jax.jit(one)(params, grads)
    np.testing.assert_array_equal(state.mask["kernel"], reference.mask["kernel"])
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=1e-6)
    if axis_type is AxisType.Explicit:
        assert state.mask["kernel"].sharding.is_equivalent_to(sharding, 2)


def test_within_in_a_donated_step():
    """The state owns its buffers, and what the user pruned is no leak."""
    params = new_params()
    within = {**jax.tree.map(lambda x: None, params), "kernel": params["kernel"] > 0}
    tx = sparsify(optax.sgd(0.1), schedule=0.7, every=100, within=within)
    grads = jax.tree.map(jnp.ones_like, params)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        params, state = step(params, state)
    sparsity.check(params, state)
    assert not np.any(np.asarray(params["kernel"])[~np.asarray(within["kernel"])])


def test_within_for_a_leaf_that_is_not_pruned_is_refused():
    params = {"a": jnp.ones((2, 2)), "c": jnp.ones((2, 2))}
    within = {"a": None, "c": jnp.eye(2, dtype=bool)}
    with pytest.raises(errors.ArgumentError, match=r"not pruned here: \['c'\]"):
        sparsify(optax.sgd(0.1), schedule=0.5, where="a", within=within).init(params)
    again = sparsity.make_mask(params, sparsity=0.5, where="a", within=within)
    np.testing.assert_array_equal(again["c"], np.eye(2, dtype=bool))


def test_vmap_over_an_ensemble():
    tx = sparsify(optax.sgd(0.1), schedule=0.5)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p + 1]), {"w": new_params()["kernel"]})
    updates, _ = jax.vmap(lambda p: tx.update(p, tx.init(p), p))(params)
    assert ((params["w"] + updates["w"]) == 0).sum(axis=(1, 2)).tolist() == [24, 24]


# --- Misuse -------------------------------------------------------------------------------------


def test_not_outermost_is_detected():
    tx = optax.chain(sparsify(optax.sgd(0.1), schedule=0.5), optax.add_noise(0.1, 0.5, 0))
    seen, state = train(tx, 1)
    with pytest.raises(errors.ArgumentError, match="goes on after sparsify"):
        sparsity.check(seen[-1], state)
    with pytest.raises(errors.ArgumentError, match="24 entries that are not zero"):
        sparsity.check(seen[-1], state[0])


def test_a_leak_is_counted_inside_jit():
    tx = sparsify(optax.sgd(0.1), schedule=0.5)
    params = new_params()
    state = tx.init(params)
    sparsity.check(params, state)  # nothing is pruned yet
    update = jax.jit(tx.update)
    for _ in range(2):  # forgets to apply the first update
        _, state = update(params, state, params)
    assert int(state.leaked) == 24
    masked = sparsity.apply(params, sparsity.get_mask(state))
    with pytest.raises(errors.ArgumentError, match="24 at the last mask update"):
        sparsity.check(masked, state)


def test_chained_inside_or_before_is_fine():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    tx = optax.chain(optax.clip(1.0), sparsify(inner, schedule=0.5))
    seen, state = train(tx, 2)
    sparsity.check(seen[-1], state)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one"),
        ({"schedule": 1.5}, "from 0"),
        ({"schedule": 0.5, "every": 0}, "every"),
        ({"schedule": 0.5, "until": -1}, "until"),
        ({"schedule": 0.9, "pattern": NM(2, 4)}, "at most 0.5"),
        ({"schedule": 0.5, "scope": "all"}, "scope"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(errors.ArgumentError, match=says):
        sparsify(optax.sgd(0.1), **arguments)


def test_bad_calls():
    tx, params = sparsify(optax.sgd(0.1), schedule=0.5), new_params()
    with pytest.raises(errors.ArgumentError, match=r"tx\.update"):
        tx.update(params, tx.init(params))
    with pytest.raises(errors.StructureError, match="updates"):
        tx.update({"kernel": params["kernel"]}, tx.init(params), params)
    with pytest.raises(errors.StructureError, match="mask"):
        tx.update(params, tx.init({"kernel": params["kernel"]}), params)
    with pytest.raises(errors.NonFiniteError):
        tx.init({"w": jnp.full((2, 2), jnp.nan)})
    with pytest.raises(errors.SelectionError):
        tx.init({"b": jnp.ones(3)})
    with pytest.raises(errors.SelectionError, match="do not divide"):
        sparsify(optax.sgd(0.1), schedule=0.5, pattern=Block((3, 4)), strict=True).init(params)
    with pytest.raises(errors.StructureError, match="SparsifyState"):
        sparsity.get_mask(optax.adam(1e-3).init(params))
