"""`shrink_state`: optimizers go on after shrinking as if they had always been small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcompress import adapters, sparsity, structured, tree
from jaxcompress.errors import ArgumentError, StructureError

X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
UNITS = [0, 2, 5]


def fn(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


def make_params():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {"up": {"kernel": draw(3, 8), "bias": draw(8)}, "down": {"kernel": draw(8, 2)}}


@pytest.fixture(scope="module")
def keep():
    return structured.keep(structured.groups(fn, make_params(), X), {"up/kernel": UNITS})


@pytest.fixture(scope="module")
def small_fn(keep):
    return structured.rebuild(fn, keep)


def steps(tx, loss, params, state, count):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state)
    return params, state


def loss_of(function):
    return lambda params: jnp.sum(function(params, X) ** 2)


OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    "ema": optax.chain(optax.trace(0.9), optax.ema(0.9), optax.scale(-0.01)),
    "lion": optax.lion(0.01),
    "masked": optax.masked(optax.adam(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 2),
    "multi_transform": optax.multi_transform(
        {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, momentum=0.9)},
        lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", p),
    ),
    "finite": optax.apply_if_finite(optax.adam(0.1), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_it_would_have_with_what_is_kept(name, keep, small_fn):
    # Entries of a leaf do not see each other in these optimizers. The reference is the dense
    # model with the other units silent: their way out is zero, and so are their gradients.
    tx = OPTIMIZERS[name]
    dense = make_params()
    silent = [u for u in range(8) if u not in UNITS]
    dense["down"]["kernel"] = dense["down"]["kernel"].at[jnp.array(silent)].set(0)
    masked = structured.mask_params(dense, keep)
    loss = loss_of(lambda p, x: fn(structured.mask_params(p, keep), x))
    params, state = steps(tx, loss, masked, tx.init(masked), 3)

    small_state, report = structured.shrink_state(tx, state, params, keep)
    small_params = structured.slice_params(params, keep)
    assert not report.reset and report.sliced
    small = steps(tx, loss_of(small_fn), small_params, small_state, 2)
    params, state = steps(tx, loss, params, state, 2)
    expected = structured.slice_params(params, keep)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), small[0], expected
    )


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon", "adafactor", "lbfgs", "sparsify"])
def test_the_result_has_exactly_the_structure_of_a_fresh_state(name, keep):
    params = make_params()
    tx = (
        OPTIMIZERS.get(name)
        or {
            "muon": optax.contrib.muon(0.1),
            "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
            "lbfgs": optax.scale_by_lbfgs(memory_size=2),
            "sparsify": sparsity.sparsify(
                optax.adam(0.1), schedule=0.5, score=sparsity.taylor(), where="**/kernel"
            ),
        }[name]
    )
    state, report = structured.shrink_state(tx, tx.init(params), params, keep)
    expected = jax.eval_shape(tx.init, structured.slice_params(params, keep))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    assert len(report.sliced) + len(report.kept) + len(report.reset) == len(jax.tree.leaves(state))
    assert bool(report.reset) == (name in ("adafactor", "lbfgs"))


def test_factored_moments_start_anew_with_their_count_and_are_named(keep):
    params = make_params()
    tx = optax.adafactor(0.1, min_dim_size_to_factor=3, momentum=0.9)
    _, state = steps(tx, loss_of(fn), params, tx.init(params), 3)
    small, report = structured.shrink_state(tx, state, params, keep)
    assert (
        "(8,) for 'up/kernel' of (3, 8)"
        in report.reset["0/v_row/up/kernel"] + report.reset["0/v_col/up/kernel"]
    )
    assert report.reset["0/count"].startswith("made anew beside others")
    assert int(state[0].count) == 3 and int(small[0].count) == 0
    assert float(jnp.sum(jnp.abs(small[0].v["up"]["bias"]))) == 0.0
    # Momentum is another transformation's: it is sliced, and not reset with them.
    momentum = [path for path in report.sliced if path.endswith("ema/up/kernel")]
    assert len(momentum) == 1 and "reset" in str(report)


def test_masks_and_scores_of_sparsify_are_sliced(keep, small_fn):
    params = make_params()
    tx = sparsity.sparsify(
        optax.adam(0.1), schedule=0.5, every=10, score=sparsity.taylor(), where="**/kernel"
    )
    params, state = steps(tx, loss_of(fn), params, tx.init(params), 3)
    small, report = structured.shrink_state(tx, state, params, keep)
    assert np.array_equal(
        small.mask["up"]["kernel"], np.asarray(state.mask["up"]["kernel"])[:, UNITS]
    )
    totals = [np.asarray(s.scores["down"]["kernel"].total) for s in (small, state)]
    assert np.array_equal(totals[0], totals[1][UNITS]) and not report.reset
    fewer = structured.slice_params(params, keep)
    trained, after = steps(tx, loss_of(small_fn), fewer, small, 1)
    assert int(after.step) == 4
    sparsity.check(trained, after)


def test_params_of_one_collection_are_found_under_it(keep):
    groups = structured.groups(lambda v, x: fn(v["params"], x), {"params": make_params()}, X)
    inside = structured.keep(groups, {"params/up/kernel": UNITS})
    params, tx = make_params(), optax.sgd(0.1, momentum=0.9)
    state, _ = structured.shrink_state(tx, tx.init(params), params, inside, under="params")
    assert tree.paths(state[0].trace) == tree.paths(params)
    assert state[0].trace["down"]["kernel"].shape == (3, 2)
    with pytest.raises(ArgumentError, match="a leaf that the indices were chosen for"):
        structured.shrink_state(tx, tx.init(params), params, inside)


def test_other_libraries_and_stacked_layers(keep):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    function, params = adapters.from_nnx(Mlp(nnx.Rngs(0)))
    chosen = structured.keep(structured.groups(function, params, X), {"up/kernel": UNITS})
    tx = optax.adam(0.1)
    state, report = structured.shrink_state(tx, tx.init(params), params, chosen)
    assert state[0].mu["up"]["kernel"].shape == (3, 3) and len(report.sliced) == 6

    def scanned(p, x):
        body = lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None)
        return jax.lax.scan(body, x, p)[0]

    rng = np.random.default_rng(2)
    stacked = {"up": jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32),
               "down": jnp.asarray(rng.standard_normal((2, 8, 3)), jnp.float32)}  # fmt: skip
    units = np.array([[0, 1], [3, 7]])
    chosen = structured.keep(structured.groups(scanned, stacked, X), {"up": units})
    state = tx.init(stacked)
    state = (state[0]._replace(mu=stacked), *state[1:])
    small, _ = structured.shrink_state(tx, state, stacked, chosen)
    for layer in range(2):
        expected = np.asarray(stacked["up"])[layer][:, units[layer]]
        assert np.array_equal(small[0].mu["up"][layer], expected)


def test_shapes_stay_shapes(keep):
    params = jax.eval_shape(make_params)
    for tx in (optax.adam(0.1), optax.adafactor(0.1, min_dim_size_to_factor=2)):
        state, _ = structured.shrink_state(tx, jax.eval_shape(tx.init, params), params, keep)
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))


def test_misuse_is_refused(keep):
    params, tx = make_params(), optax.adam(0.1)
    with pytest.raises(StructureError, match="a state of tx for these params"):
        structured.shrink_state(tx, optax.sgd(0.1, momentum=0.9).init(params), params, keep)
    small = structured.slice_params(params, keep)
    with pytest.raises(ArgumentError, match="Shrink the state from full size, once"):
        structured.shrink_state(tx, tx.init(small), params, keep)
