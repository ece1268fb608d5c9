import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxcompress import train
from jaxcompress.errors import ArgumentError, SelectionError
from jaxcompress.train import schedules

RATE = 0.05
PARAMS = {"w": jnp.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]]), "b": jnp.array([0.5, -0.5, 1.0])}

METHODS = {
    "gd": (train.GD(), optax.sgd(RATE)),
    "sgd": (train.SGD(), optax.sgd(RATE)),
    "momentum": (train.Momentum(momentum=0.8), optax.sgd(RATE, momentum=0.8)),
    "nesterov": (train.Nesterov(), optax.sgd(RATE, momentum=0.9, nesterov=True)),
    "adagrad": (train.Adagrad(initial=0.2), optax.adagrad(RATE, 0.2)),
    "rmsprop": (train.RMSProp(decay=0.95), optax.rmsprop(RATE, decay=0.95)),
    "adam": (train.Adam(b1=0.8), optax.adam(RATE, b1=0.8)),
    "adamw": (train.AdamW(b2=0.99), optax.adamw(RATE, b2=0.99, weight_decay=0.0)),
    "lion": (train.Lion(b1=0.85), optax.lion(RATE, b1=0.85, weight_decay=0.0)),
    "muon": (train.Muon(beta=0.9), optax.contrib.muon(RATE, beta=0.9)),
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


def config(method, **kwargs):
    return train.OptimizerConfig(method=method, learning_rate=RATE, **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_equals_optax_and_lowers_the_loss(name):
    method, direct = METHODS[name]
    ours, _ = descend(train.optimizer(config(method)))
    theirs, _ = descend(optax.with_extra_args_support(direct))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    assert quadratic(ours) < 0.95 * quadratic(PARAMS)


def test_adam_is_bias_corrected():
    tx = train.optimizer(config(train.Adam(eps=0.0)))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], -RATE * np.sign(PARAMS["w"]), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_decoupled_decay_spares_what_decay_does_not_select(name):
    method, _ = METHODS[name]
    plain, decayed = (train.optimizer(config(method, weight_decay=decay)) for decay in (0.0, 0.1))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    a, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
    b, _ = decayed.update(grads, decayed.init(PARAMS), PARAMS)
    np.testing.assert_allclose(b["w"], a["w"] - RATE * 0.1 * PARAMS["w"], rtol=1e-5)
    np.testing.assert_array_equal(b["b"], a["b"])


def test_coupled_decay_is_added_to_the_clipped_gradient():
    tx = train.optimizer(config(train.SGD(), clip_value=0.5, weight_decay=0.1), decay="b")
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["b"], -RATE * (0.5 + 0.1 * PARAMS["b"]), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], -RATE * 0.5 * np.ones((2, 3)), rtol=1e-6)


@pytest.mark.parametrize("method", [train.SGD(), train.AdamW(), train.Muon()])
def test_decay_that_selects_nothing_raises(method):
    tx = train.optimizer(config(method, weight_decay=0.1), decay="**/kernel")
    with pytest.raises(SelectionError, match="kernel"):
        tx.init(PARAMS)


def test_value_clipping_comes_before_norm_clipping():
    tx = train.optimizer(config(train.SGD(), clip_value=1.0, clip_norm=1.0))
    updates, _ = tx.update({"x": jnp.array([100.0, 0.5])}, tx.init({"x": jnp.zeros(2)}))
    clipped = np.array([1.0, 0.5])
    np.testing.assert_allclose(updates["x"], -RATE * clipped / np.linalg.norm(clipped), rtol=1e-6)


def test_the_schedule_drives_the_rate():
    schedule = schedules.Linear(steps=2)
    tx = train.optimizer(config(train.SGD(), schedule=schedule, warmup=2))
    state, rates = tx.init(1.0), []
    for _ in range(5):
        updates, state = tx.update(jnp.ones(()), state)
        rates.append(-float(updates))
    np.testing.assert_allclose(rates, RATE * np.array([0.0, 0.5, 1.0, 0.5, 0.0]), atol=1e-8)


def test_plateau_lowers_the_rate_when_the_loss_stops_falling():
    plateau = schedules.Plateau(factor=0.5, patience=2, steps=1)
    tx = train.optimizer(config(train.SGD(), schedule=plateau))
    state, rates = tx.init(jnp.ones(())), []
    for value in [3.0, 2.0, 2.0, 2.0, 1.0, 1.0]:
        updates, state = tx.update(jnp.ones(()), state, value=jnp.asarray(value))
        rates.append(round(-float(updates) / RATE, 6))
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "kwargs",
    [{"learning_rate": 0.0}, {"clip_norm": -1.0}, {"clip_value": 0.0}, {"weight_decay": -0.1}],
)
def test_bad_configs_are_refused(kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        train.OptimizerConfig(**kwargs)


def test_the_config_is_a_command_line():
    import tyro

    rate, method = "--learning-rate 0.5", "method:lion --method.b1 0.7"
    line = f"{rate} {method} schedule:cosine --schedule.steps 9"
    parsed = tyro.cli(train.OptimizerConfig, args=line.split())
    assert parsed.method == train.Lion(b1=0.7)
    assert parsed.schedule == schedules.Cosine(steps=9)
    assert parsed.learning_rate == 0.5


def test_plateau_waits_for_the_warm_up():
    config = train.OptimizerConfig(
        method=train.SGD(),
        learning_rate=1.0,
        schedule=train.schedules.Plateau(factor=0.5, patience=1, steps=1),
        warmup=10,
    )
    tx = train.optimizer(config)
    params = {"w": jnp.zeros(())}
    state, moves = tx.init(params), []
    for _ in range(16):
        updates, state = tx.update({"w": -jnp.ones(())}, state, params, value=jnp.ones(()))
        moves.append(float(updates["w"]))
    np.testing.assert_allclose(moves[:11], np.arange(11) / 10, rtol=1e-6)
    assert moves[-1] < 0.3  # the loss stands still, and now that counts


@pytest.mark.parametrize("method", [train.Momentum(momentum=1.5), train.Adam(b1=-0.1)])
def test_decays_outside_their_range_are_refused(method):
    with pytest.raises(ArgumentError, match=r"`method\.(momentum|b1)`"):
        train.OptimizerConfig(method=method)
