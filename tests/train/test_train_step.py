import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import adapters, train, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError

TX = optax.adam(1e-2)
KEY = jax.random.key(0)


def run(problem, batch, *, steps=3, loss=None, **kwargs):
    state = train.init(problem.params, TX, key=KEY)
    step = train.make_step(loss or problem.loss, TX, **kwargs)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def close(a, b, **tolerance):
    for (path, x), (_, y) in zip(tree.items(a), tree.items(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=path, **tolerance)


@pytest.fixture(scope="module")
def plain(problem, batch):
    return run(problem, batch)


def test_equals_the_optax_loop_by_hand(problem, batch, plain):
    params = jax.tree.map(jnp.asarray, problem.params)
    opt_state = TX.init(params)

    @jax.jit
    def by_hand(params, opt_state):
        grads = jax.grad(lambda p: jnp.mean(problem.loss(p, batch, KEY)))(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    for _ in range(3):
        loss = jnp.mean(problem.loss(params, batch, KEY))
        params, opt_state, norm = by_hand(params, opt_state)
    state, metrics = plain
    close(state.params, params, rtol=1e-6, atol=1e-7)
    assert int(state.step) == 3
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_init_copies_and_the_step_donates(problem, batch):
    params = jax.tree.map(jnp.asarray, problem.params)
    state = train.init(params, TX, key=KEY)
    train.make_step(problem.loss, TX)(state, batch)
    assert state.params["first"]["kernel"].is_deleted()
    assert not params["first"]["kernel"].is_deleted()


@pytest.mark.parametrize("accumulate", [2, 16])
def test_accumulation_equals_the_whole_batch(problem, batch, plain, accumulate):
    state, metrics = run(problem, batch, accumulate=accumulate)
    close(state.params, plain[0].params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], plain[1]["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable])
def test_rematerialization_changes_nothing(problem, batch, plain, remat):
    state, _ = run(problem, batch, remat=remat)
    close(state.params, plain[0].params, rtol=1e-6, atol=1e-7)


def test_rematerialization_reaches_the_jaxpr(problem, batch):
    state = train.init(problem.params, TX, key=KEY)
    for remat in (False, True):
        step = train.make_step(problem.loss, TX, remat=remat)
        jaxpr = str(jax.make_jaxpr(step.update)(state, batch))
        assert ("remat" in jaxpr or "checkpoint" in jaxpr) == remat


def masked_loss(problem):
    def loss(params, batch, key):
        per_example = problem.loss(params, batch, key)
        metrics = {"first": batch["x"][:, 0], "two": 2.0}
        return per_example, train.Aux(metrics=metrics, weights=batch["weight"])

    return loss


@pytest.fixture(scope="module")
def ten(problem, batch):
    """The first ten examples, and training on them."""
    kept = jax.tree.map(lambda x: x[:10], batch)
    return kept, run(problem, kept)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_mask_padding(problem, batch, ten, accumulate):
    kept, (expected, plain_metrics) = ten
    weight = np.asarray([1.0] * 10 + [0.0] * 6, np.float32)
    padded = {**batch, "weight": weight}
    state, metrics = run(problem, padded, loss=masked_loss(problem), accumulate=accumulate)
    close(state.params, expected.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["first"], kept["x"][:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["two"], 2.0, rtol=1e-6)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 5), min_size=16, max_size=16).filter(any))
def test_weights_are_a_weighted_mean(weighted_step, weights):
    problem, batch, step, state = weighted_step
    weights = np.asarray(weights, np.float32)
    _, metrics = step(state, {**batch, "weight": weights})
    losses = np.asarray(problem.loss(problem.params, batch, KEY))
    np.testing.assert_allclose(metrics["loss"], np.average(losses, weights=weights), rtol=1e-5)


@pytest.fixture(scope="module")
def weighted_step(problem, batch):
    step = train.make_step(masked_loss(problem), TX, donate=False, accumulate=4)
    return problem, batch, step, train.init(problem.params, TX, key=KEY)


@pytest.mark.usefixtures("strict_promotion")
def test_promotes_no_dtypes_of_its_own(problem, batch):
    def loss(params, batch, key):
        metrics = {"positive": batch["y"][:, 0] > 0, "count": jnp.int32(3)}
        return problem.loss(params, batch, key).astype(jnp.bfloat16), train.Aux(metrics=metrics)

    tx = optax.sgd(0.1)
    state = train.init(problem.params, tx, key=KEY)
    _, metrics = train.make_step(loss, tx, accumulate=2)(state, batch)
    assert metrics["positive"] == np.mean(batch["y"][:, 0] > 0) and metrics["count"] == 3


def test_a_scalar_loss_is_taken_as_the_mean(problem, batch, plain):
    scalar = lambda *args: jnp.mean(problem.loss(*args))
    state, _ = run(problem, batch, loss=scalar, accumulate=4)
    close(state.params, plain[0].params, rtol=1e-5, atol=1e-6)


def test_each_step_and_microbatch_has_its_own_key():
    draw = lambda params, batch, key: (
        params * jax.random.uniform(key) + batch,
        train.Aux(metrics={"draw": jax.random.uniform(key)}),
    )
    draws = []
    for accumulate in (1, 2):
        step = train.make_step(draw, optax.sgd(0.1), accumulate=accumulate)
        state = train.init(jnp.ones(()), optax.sgd(0.1), key=KEY)
        for _ in range(2):
            state, metrics = step(state, jnp.zeros(4))
            draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 4
    assert draws[0] == jax.random.uniform(jax.random.fold_in(KEY, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(problem, batch, bad):
    state = train.init(problem.params, TX, key=KEY)
    step = train.make_step(problem.loss, TX, donate=False)
    before, _ = step(state, batch)
    poisoned = {**batch, "x": np.where(np.arange(16)[:, None] == 3, bad, batch["x"])}
    after, metrics = step(before, poisoned)
    assert metrics["skipped"] == 1.0
    assert int(after.skipped) == 1 and int(after.step) == 2
    for part in ("params", "opt_state"):
        old, new = (jax.tree.leaves(getattr(state, part)) for state in (before, after))
        for x, y in zip(old, new, strict=True):
            np.testing.assert_array_equal(x, y)
    resumed, metrics = step(after, batch)
    assert metrics["skipped"] == 0.0 and int(resumed.skipped) == 1
    assert np.all(np.isfinite(resumed.params["first"]["kernel"]))


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_finite():
    step = train.make_step(lambda p, batch, key: jnp.sqrt(p) + batch, optax.sgd(0.1))
    state = train.init(jnp.zeros(()), optax.sgd(0.1), key=KEY)
    state, metrics = step(state, jnp.ones(4))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert float(state.params) == 0.0 and int(state.skipped) == 1


def test_without_the_guard_nan_goes_through(problem, batch):
    poisoned = {**batch, "x": np.full_like(batch["x"], np.nan)}
    state, metrics = run(problem, poisoned, skip_nonfinite=False, steps=1)
    assert np.isnan(state.params["first"]["kernel"]).all()
    assert "skipped" not in metrics


def test_the_loss_computes_in_the_policy_s_dtype(problem, batch):
    seen = {}

    def loss(params, batch, key):
        seen.update(
            kernel=params["params"]["first"]["kernel"].dtype,
            stats=params["batch_stats"].dtype,
            x=batch["x"].dtype,
            label=batch["label"].dtype,
        )
        return problem.loss(params["params"], batch, key)

    precision = train.Precision(params="float32", compute="bfloat16")
    variables = {
        "params": jax.tree.map(lambda x: x.astype(np.float16), problem.params),
        "batch_stats": np.zeros(3, np.float32),
    }
    state = train.init(variables, TX, key=KEY, precision=precision)
    step = train.make_step(loss, TX, precision=precision)
    state, metrics = step(state, {**batch, "label": np.zeros(16, np.int32)})
    assert seen == {"kernel": "bfloat16", "stats": "float32", "x": "bfloat16", "label": "int32"}
    assert state.params["params"]["first"]["kernel"].dtype == "float32"
    assert state.opt_state[0].mu["params"]["first"]["kernel"].dtype == "float32"
    assert metrics["loss"].dtype == "float32"
    exact = np.mean(problem.loss(problem.params, batch, KEY))
    np.testing.assert_allclose(metrics["loss"], exact, rtol=0.03)


def test_output_sets_the_dtype_of_means(problem, batch):
    precision = train.Precision(compute="bfloat16", output="bfloat16")
    _, metrics = run(problem, batch, steps=1, precision=precision)
    assert metrics["loss"].dtype == "bfloat16"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(x)
        return nn.Dense(2)(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_norm_state_is_kept_apart_and_updated(batch, accumulate):
    net = Net()
    variables = jax.jit(lambda k, x: net.init(k, x, training=False))(KEY, batch["x"])

    def loss(params, batch, key):
        out, state = net.apply(params, batch["x"], training=True, mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2, axis=1), train.Aux(state=state)

    tx = optax.sgd(0.1)
    state = train.init(variables, tx, key=KEY)
    state, _ = train.make_step(loss, tx, accumulate=accumulate)(state, batch)
    mean = np.zeros(4)
    for i in range(accumulate):
        mean = 0.5 * mean + 0.5 * batch["x"][i::accumulate].mean(0)
    updated = state.params["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(updated, mean, rtol=1e-5, atol=1e-6)
    kernel = state.params["params"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel, variables["params"]["Dense_0"]["kernel"])


def test_nnx_state_trains_with_its_batch_statistics(batch):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(x))

    fn, params = adapters.from_nnx(Small(nnx.Rngs(0)), mutable=nnx.BatchStat)

    def loss(params, batch, key):
        out, state = fn(params, batch["x"])
        return jnp.mean((out - batch["y"]) ** 2, axis=1), train.Aux(state=state)

    state = train.init(params, TX, key=KEY)
    step = train.make_step(loss, TX)
    first = None
    for _ in range(20):
        state, metrics = step(state, batch)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < first
    mean = tree.select(state.params, "norm/mean")["norm/mean"]
    np.testing.assert_allclose(mean, batch["x"].mean(0), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_frozen_leaves_stay(problem, batch):
    where = "second/*"
    state = train.init(problem.params, TX, key=KEY, trainable=where)
    state, _ = train.make_step(problem.loss, TX, trainable=where)(state, batch)
    np.testing.assert_array_equal(
        state.params["first"]["kernel"], problem.params["first"]["kernel"]
    )
    assert not np.allclose(state.params["second"]["kernel"], problem.params["second"]["kernel"])


def test_the_loss_reaches_the_optimizer_as_value(problem, batch):
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = optax.chain(train.optimizer("sgd", learning_rate=1e-3), plateau)
    state = train.init(problem.params, tx, key=KEY)
    state, metrics = train.make_step(problem.loss, tx)(state, batch)
    assert optax.tree.get(state.opt_state, "best_value") == metrics["loss"]


def aux_loss(aux):
    return lambda params, batch, key: (jnp.sum(params["w"]) * batch, aux)


@pytest.mark.parametrize(
    ("aux", "error", "match"),
    [
        (train.Aux(state={"w": jnp.ones(2)}), StructureError, "trainable 'w'"),
        (train.Aux(state={"nowhere": jnp.ones(2)}), StructureError, "unknown 'nowhere'"),
        (train.Aux(state={"batch_stats": jnp.ones(5)}), StructureError, "reshaped"),
        (train.Aux(metrics={"grad_norm": 1.0}), ArgumentError, "grad_norm"),
        (train.Aux(metrics={"loss": 1.0}), ArgumentError, "Rename"),
        (train.Aux(metrics={"odd": jnp.ones(3)}), ArgumentError, "`odd`"),
        (train.Aux(weights=jnp.ones(3)), ArgumentError, "weights"),
    ],
)
def test_bad_losses_are_refused(aux, error, match):
    params = {"w": jnp.ones(2), "batch_stats": jnp.ones(2)}
    state = train.init(params, TX, key=KEY)
    with pytest.raises(error, match=match):
        train.make_step(aux_loss(aux), TX)(state, jnp.ones(4))


def test_bad_batches_are_refused(problem, batch):
    with pytest.raises(ArgumentError, match="divisor"):
        run(problem, batch, accumulate=5)
    with pytest.raises(ArgumentError, match="accumulate"):
        train.make_step(problem.loss, TX, accumulate=0)
    with pytest.raises(ArgumentError, match="leading size"):
        run(problem, {**batch, "y": batch["y"][:3]})
    with pytest.raises(ArgumentError, match="one value per example"):
        run(problem, batch, loss=lambda p, b, key: jnp.ones((16, 2)) * p["second"]["bias"])


def test_options_that_init_did_not_have_are_refused():
    params, batch = {"a": jnp.ones(2), "b": jnp.ones(2)}, jnp.ones((4, 2))
    loss = lambda params, x, key: (x * params["a"] * params["b"]).sum(1)
    tx = optax.adam(0.1)
    begin = lambda **options: train.init(params, tx, key=jax.random.key(0), **options)
    with pytest.raises(StructureError, match="same `trainable`"):
        train.make_step(loss, tx, trainable="a")(begin(), batch)
    with pytest.raises(StructureError, match="bfloat16.*got 'a' in float32"):
        train.make_step(loss, tx, precision=train.Precision(params="bfloat16"))(begin(), batch)


@pytest.mark.parametrize(
    "output",
    [
        lambda x: (x, {"m": 1.0}),
        lambda x: (x, x, train.Aux()),
        lambda x: jnp.ones(4, jnp.int32),
    ],
    ids=["dict", "three", "integer"],
)
def test_what_is_no_loss_is_refused(output):
    tx = optax.sgd(0.1)
    state = train.init({"w": jnp.ones(())}, tx, key=jax.random.key(0))
    step = train.make_step(lambda params, x, key: output(params["w"] * x), tx)
    with pytest.raises(ArgumentTypeError, match=r"train\.Aux\(metrics="):
        step(state, jnp.ones(4))


def test_narrow_gradients_accumulate_in_float32():
    precision = train.Precision(params="bfloat16", compute="float32")
    x = jax.random.normal(jax.random.key(0), (512, 4)) + 1
    loss = lambda params, x, key: x @ params["w"]
    tx = optax.sgd(1.0)
    results = []
    for accumulate in (1, 512):
        state = train.init({"w": jnp.zeros(4)}, tx, key=jax.random.key(0), precision=precision)
        step = train.make_step(loss, tx, precision=precision, accumulate=accumulate)
        results.append(step(state, x)[0].params["w"].astype(jnp.float32))
    np.testing.assert_allclose(*results, rtol=2**-8)
