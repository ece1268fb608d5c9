"""One device, eight data-parallel devices and a 4 x 2 mesh give the same training."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import quantize, sparsity, train, tree
from jaxcompress.errors import ArgumentError, SelectionError

KEY = jax.random.key(0)
RULES = {
    "first/kernel": P(None, "model"),
    "first/bias": P("model"),
    "second/kernel": P("model", None),
}
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


def make_mesh(shape, kind):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def train_on(problem, batch, tx, loss, **kwargs):
    state = train.init(problem.params, tx, key=KEY)
    step = train.make_step(loss, tx, **kwargs)
    for _ in range(6):
        state, metrics = step(state, batch)
    return state, metrics


@pytest.fixture(scope="module")
def sparse_qat(problem):
    """A loss with fake-quantized weights and an optimizer that prunes: `(loss, tx)`."""
    schedule = sparsity.schedules.linear(0.75, end=4)
    inner = train.optimizer("adamw", learning_rate=1e-2, weight_decay=1e-2, clip_norm=1.0)
    tx = sparsity.sparsify(inner, schedule=schedule, every=2)

    def loss(params, batch, key):
        quantized = quantize.fake_quant(params, quantize.presets.int8_weights)
        return problem.loss(quantized, batch, key)

    return loss, tx


@pytest.fixture(scope="module")
def single(problem, batch, sparse_qat):
    loss, tx = sparse_qat
    return train_on(problem, batch, tx, loss)


@pytest.mark.parametrize(
    ("shape", "kind", "rules"),
    [((8,), AUTO, None), ((4, 2), AUTO, RULES), ((4, 2), EXPLICIT, RULES)],
    ids=["data", "data-model", "data-model-explicit"],
)
def test_masked_and_quantized_training_equals_one_device(
    problem, batch, sparse_qat, single, shape, kind, rules
):
    loss, tx = sparse_qat
    mesh = make_mesh(shape, kind)
    state, metrics = train_on(problem, batch, tx, loss, mesh=mesh, sharding=rules)
    expected, expected_metrics = single
    mask, expected_mask = (sparsity.get_mask(s.opt_state) for s in (state, expected))
    for (path, a), b in zip(tree.items(mask), jax.tree.leaves(expected_mask), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
        assert np.mean(a) == 0.25
        assert np.all(np.asarray(dict(tree.items(state.params))[path])[~np.asarray(a)] == 0)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    if rules:
        assert mask["first"]["kernel"].sharding.spec == P(None, "model")
        assert state.params["first"]["kernel"].sharding.spec == P(None, "model")


def test_mirrors_of_params_are_found_by_path_and_shape(problem):
    mesh = make_mesh((4, 2), AUTO)
    tx = optax.chain(optax.adam(1e-3), optax.scale_by_factored_rms(min_dim_size_to_factor=2))
    rules = {"first/kernel": P(None, "model"), "first/bias": P("model")}
    state = train.init(problem.params, tx, key=KEY, mesh=mesh, sharding=rules)
    adam, factored = state.opt_state[0][0], state.opt_state[1]
    for tree_of_arrays in (state.params, adam.mu, adam.nu):
        assert tree_of_arrays["first"]["kernel"].sharding.spec == P(None, "model")
        assert tree_of_arrays["first"]["bias"].sharding.spec == P("model")
        assert tree_of_arrays["second"]["kernel"].sharding.is_fully_replicated
    # A factored moment has the parameter's path but not its shape.
    assert factored.v_row["first"]["kernel"].sharding.is_fully_replicated
    assert adam.count.sharding.device_set == set(mesh.devices.flat)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_a_step_keeps_its_shardings(problem, batch, kind, accumulate):
    mesh, rules = make_mesh((4, 2), kind), {"first/kernel": P(None, "model")}
    tx = optax.sgd(0.1, momentum=0.9)
    state = train.init(problem.params, tx, key=KEY, mesh=mesh, sharding=rules)
    step = train.make_step(problem.loss, tx, mesh=mesh, sharding=rules, accumulate=accumulate)
    new, _ = step(state, batch)
    assert new.params["first"]["kernel"].sharding.spec == P(None, "model")
    assert new.opt_state[0].trace["first"]["kernel"].sharding.spec == P(None, "model")
    assert state.params["first"]["kernel"].is_deleted()


def test_a_loss_may_constrain_by_the_names_of_the_mesh(problem, batch):
    def loss(params, batch, key):
        x = jax.lax.with_sharding_constraint(batch["x"], P("data", "model"))
        return problem.loss(params, {**batch, "x": x}, key)

    tx = optax.sgd(0.1)
    expected, _ = train_on(problem, batch, tx, problem.loss)
    state, _ = train_on(problem, batch, tx, loss, mesh=make_mesh((4, 2), EXPLICIT))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_explicitly_sharded_batch_is_taken(problem, batch):
    mesh = make_mesh((8,), EXPLICIT)
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    tx = optax.sgd(0.1)
    a, _ = train_on(problem, placed, tx, problem.loss, mesh=mesh)
    b, _ = train_on(problem, batch, tx, problem.loss, mesh=mesh)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"third/*": P("model")}, SelectionError, "nearest"),
        ({"first/bias": P("rows")}, ArgumentError, "rows"),
        ({"first/bias": P(None, "model")}, ArgumentError, "at most one entry per axis"),
        ({"second/bias": P(("data", "model"))}, ArgumentError, "split 8 ways"),
    ],
)
def test_bad_rules_are_refused(problem, rules, error, match):
    with pytest.raises(error, match=match):
        train.init(
            problem.params, optax.sgd(0.1), key=KEY, mesh=make_mesh((4, 2), AUTO), sharding=rules
        )


def test_bad_batches_are_refused(problem, batch):
    tx, mesh = optax.sgd(0.1), make_mesh((8,), AUTO)
    with pytest.raises(ArgumentError, match="'batch/x' of shape"):
        train.make_step(problem.loss, tx, mesh=mesh).place({"x": batch["x"][:12]})
    with pytest.raises(ArgumentError, match="axis 'rows'"):
        train.make_step(problem.loss, tx, mesh=mesh, data_axis="rows").place(batch)
