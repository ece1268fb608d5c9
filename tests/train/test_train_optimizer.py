import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxcompress import train
from jaxcompress.errors import ArgumentError, SelectionError

RATE = 0.05
PARAMS = {"w": jnp.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]]), "b": jnp.array([0.5, -0.5, 1.0])}

METHODS = {
    "gd": ({}, optax.sgd(RATE)),
    "sgd": ({}, optax.sgd(RATE)),
    "momentum": ({"momentum": 0.8}, optax.sgd(RATE, momentum=0.8)),
    "nesterov": ({}, optax.sgd(RATE, momentum=0.9, nesterov=True)),
    "adagrad": ({"initial_accumulator_value": 0.2}, optax.adagrad(RATE, 0.2)),
    "rmsprop": ({"decay": 0.95}, optax.rmsprop(RATE, decay=0.95)),
    "adam": ({"b1": 0.8}, optax.adam(RATE, b1=0.8)),
    "adamw": ({"b2": 0.99}, optax.adamw(RATE, b2=0.99, weight_decay=0.0)),
    "lion": ({"b1": 0.85}, optax.lion(RATE, b1=0.85, weight_decay=0.0)),
    "muon": ({"beta": 0.9}, optax.contrib.muon(RATE, beta=0.9)),
}


def quadratic(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def descend(tx, steps=5, params=PARAMS, f=quadratic):
    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(f)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def optimizer(method, **kwargs):
    return train.optimizer(method, **{"learning_rate": RATE, **kwargs})


@pytest.mark.parametrize("name", METHODS)
def test_equals_optax_and_lowers_the_loss(name):
    options, direct = METHODS[name]
    ours, _ = descend(optimizer(name, **options))
    theirs, _ = descend(optax.with_extra_args_support(direct))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    assert quadratic(ours) < 0.95 * quadratic(PARAMS)


def test_momentum_is_nine_tenths_unless_given():
    ours, _ = descend(optimizer("momentum"))
    theirs, _ = descend(optax.with_extra_args_support(optax.sgd(RATE, momentum=0.9)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_adam_is_bias_corrected():
    tx = optimizer("adam", eps=0.0)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], -RATE * np.sign(PARAMS["w"]), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_decoupled_decay_spares_what_is_not_decayed(name):
    options, _ = METHODS[name]
    plain, decayed = (optimizer(name, weight_decay=decay, **options) for decay in (0.0, 0.1))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    a, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
    b, _ = decayed.update(grads, decayed.init(PARAMS), PARAMS)
    np.testing.assert_allclose(b["w"], a["w"] - RATE * 0.1 * PARAMS["w"], rtol=1e-5)
    np.testing.assert_array_equal(b["b"], a["b"])


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_nothing_decays_unless_asked(name):
    """Where the gradient is 0, so is the update, whatever optax's own default is."""
    tx = optimizer(name)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    for update in jax.tree.leaves(updates):
        np.testing.assert_array_equal(update, 0)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_decay_follows_the_schedule(name):
    tx = optimizer(name, learning_rate=optax.linear_schedule(RATE, 0.0, 2), weight_decay=0.1)
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for rate in (RATE, RATE / 2, 0.0):
        updates, state = tx.update(zeros, state, PARAMS)
        np.testing.assert_allclose(updates["w"], -rate * 0.1 * PARAMS["w"], rtol=1e-5)


def test_coupled_decay_is_added_to_the_clipped_gradient():
    tx = optimizer("sgd", clip_value=0.5, weight_decay=0.1, decayed="b")
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["b"], -RATE * (0.5 + 0.1 * PARAMS["b"]), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], -RATE * 0.5 * np.ones((2, 3)), rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_decay_that_selects_nothing_raises(name):
    tx = optimizer(name, weight_decay=0.1, decayed="**/kernel")
    with pytest.raises(SelectionError, match="kernel"):
        tx.init(PARAMS)


def test_value_clipping_comes_before_norm_clipping():
    tx = optimizer("sgd", clip_value=1.0, clip_norm=1.0)
    updates, _ = tx.update({"x": jnp.array([100.0, 0.5])}, tx.init({"x": jnp.zeros(2)}))
    clipped = np.array([1.0, 0.5])
    np.testing.assert_allclose(updates["x"], -RATE * clipped / np.linalg.norm(clipped), rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_schedule_drives_the_rate(name):
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, 2, 6)
    tx, constant = optimizer(name, learning_rate=schedule), optimizer(name, learning_rate=1.0)
    grads = {"x": jnp.ones(2)}
    state, steady, rates = tx.init(grads), constant.init(grads), []
    for _ in range(7):
        updates, state = tx.update(grads, state, grads)
        whole, steady = constant.update(grads, steady, grads)
        rates.append(float(updates["x"][0] / whole["x"][0]))
    cosine = (1 + np.cos(np.pi * np.arange(5) / 4)) / 2
    np.testing.assert_allclose(rates, RATE * np.array([0.0, 0.5, *cosine]), rtol=1e-6, atol=1e-8)


def test_what_is_chained_behind_reads_the_loss():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=1)
    tx = optax.chain(optimizer("sgd"), plateau)
    state, rates = tx.init(jnp.ones(())), []
    for value in [3.0, 2.0, 2.0, 2.0, 1.0, 1.0]:
        updates, state = tx.update(jnp.ones(()), state, value=jnp.asarray(value))
        rates.append(round(-float(updates) / RATE, 6))
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "kwargs",
    [{"learning_rate": 0.0}, {"clip_norm": -1.0}, {"clip_value": 0.0}, {"weight_decay": -0.1}],
)
def test_bad_numbers_are_refused(kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        optimizer("adamw", **kwargs)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("adamm", {}, "`method`.*got 'adamm'.*Did you mean 'adam'"),
        ("shampoo", {}, "There are 'adagrad', 'adam', 'adamw', 'gd', 'lion'"),
        ("adam", {"beta1": 0.9}, "`beta1`: expected an option of 'adam'.*'b1'"),
        ("sgd", {"momentun": 0.9}, "Did you mean 'momentum'"),
        ("adamw", {"decay": "**/kernel"}, "`decay`: .*Did you mean 'decayed' or 'weight_decay'"),
        ("adamw", {"mask": None}, "`mask`: .*Use `decayed`"),
        ("muon", {"adam_learning_rate": 0.1}, "Use `learning_rate`"),
    ],
)
def test_unknown_names_are_refused_by_the_nearest(method, options, match):
    with pytest.raises(ArgumentError, match=match):
        optimizer(method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [("momentum", {"momentum": 1.5}), ("adam", {"b1": -0.1}), ("rmsprop", {"decay": 1.0})],
)
def test_decays_outside_their_range_are_refused(method, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        optimizer(method, **options)
