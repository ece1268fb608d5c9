"""Rules of `dims` one by one: what is tied, what is frozen, and that what is left still runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import graph
from jaxcompress.errors import ArgumentError

W = {"up": (3, 8), "down": (8, 2)}


def params_of(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }


def check(between, kept, *, hidden=8, width=None, out=None):
    """Run `between` on hidden units of which some go: small must equal re-masked."""
    width = hidden if width is None else width
    params = params_of({"up": (3, hidden), "down": (width, 2)})
    fn = lambda p, x: between(x @ p["up"]) @ p["down"]
    found = graph.dims(fn, params, jnp.ones((4, 3)))
    gone = np.setdiff1d(np.arange(hidden), kept)
    labels = found.labels.rows(found.leaves["up"][1])
    down = found.labels.rows(found.leaves["down"][0])
    removed = np.setdiff1d(labels[gone], labels[np.asarray(kept)])
    keep = {
        "up": {1: np.asarray(kept)},
        "down": {0: np.flatnonzero(~np.isin(down, removed[removed >= 0]).any(axis=1))},
    }
    shapes = {name: leaf.shape for name, leaf in params.items()}
    small = {"up": params["up"][:, keep["up"][1]], "down": params["down"][keep["down"][0]]}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)), jnp.float32)
    result = jax.jit(graph.resize(fn, keep, shapes))(small, x)
    expected = jax.jit(graph.remask(fn, keep))(params, x)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    return keep


def along(of_matrix):
    """Make a positive matrix (2, 2) of each entry, and a number of what `of_matrix` gives."""

    def between(h):
        matrices = jnp.eye(2) + 0.1 * jnp.cos(h)[..., None, None]
        return of_matrix(matrices).reshape(*h.shape, -1).sum(-1)

    return between


PAIRS = [0, 2, 4, 6]  # of 8: both halves of each pair (i, i + 4)
RULES = {
    "elementwise": (lambda h: jnp.where(h > 0, h, jnp.expm1(h)) * 2, [0, 3, 5]),
    "iota": (lambda h: h * jnp.arange(8.0), [1, 4, 7]),
    "iota as a mask": (lambda h: jnp.where(jnp.arange(8) % 2 == 0, h, 0.5 * h), [1, 2, 7]),
    "constant": (lambda h: h + jnp.asarray(np.linspace(0, 1, 8), jnp.float32), [0, 6]),
    "constant in a jit": (jax.jit(lambda h: h * np.linspace(1, 2, 8).astype(np.float32)), [0, 6]),
    "random bits": (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, (8,)), [2, 3, 5]),
    "reverse": (lambda h: h[:, ::-1], [0, 1]),
    "roll": (lambda h: jnp.roll(h, 3, axis=1), [0, 1, 5]),
    "gather": (lambda h: h[:, np.array([3, 1, 0, 2, 7, 6, 5, 4])], [0, 3, 5]),
    "halves": (lambda h: jnp.concatenate([h[:, :4] - h[:, 4:], h[:, :4] + h[:, 4:]], 1), PAIRS),
    "every other": (
        lambda h: jnp.stack([h[:, ::2], h[:, 1::2] ** 2], -1).reshape(-1, 8),
        [0, 1, 6, 7],
    ),
    "heads": (lambda h: (h.reshape(-1, 2, 4) ** 2).transpose(0, 2, 1).reshape(-1, 8), [0, 1, 2, 3]),
    "softmax": (lambda h: jax.nn.softmax(h, axis=-1), [0, 3, 4]),
    "logsumexp": (lambda h: h - jax.nn.logsumexp(h, axis=-1, keepdims=True), [0, 3, 4]),
    "product": (lambda h: h * jnp.prod(h, axis=-1, keepdims=True), [1, 2, 6]),
    "minimum": (lambda h: h - jnp.min(h, axis=-1, keepdims=True), [1, 2, 6]),
    "any": (lambda h: h * jnp.all(h < 1.0, axis=-1, keepdims=True), [1, 2, 6]),
    "cumulative sum": (lambda h: jnp.cumsum(h, axis=-1), [0, 2, 7]),
    "cumulative maximum": (lambda h: lax.cummax(h, axis=1), [0, 2, 7]),
    "pad": (lambda h: jnp.pad(h, ((0, 0), (2, 1)))[:, 2:-1], [0, 5]),
    "scan over time": (lambda h: lax.scan(lambda c, x: (c + x, c * x), jnp.zeros(8), h)[1], [1, 5]),
    "while": (lambda h: lax.fori_loop(0, 3, lambda k, h: jnp.sin(h) + k, h), [1, 5]),
    "cond": (lambda h: lax.cond(h.sum() > 0, jnp.sin, lambda h: 2 * h, h), [1, 5]),
    "remat": (jax.checkpoint(lambda h: jnp.sin(h) * jnp.arange(8.0)), [1, 5]),
    "vmap": (jax.vmap(lambda h: h * jnp.arange(8.0) / jnp.linalg.norm(h)), [1, 5]),
    "dynamic slice": (
        lambda h: lax.dynamic_slice(h, (h.astype(int)[0, 0] * 0, 0), (h.shape[0], 8)),
        [0, 1, 5],
    ),
    "a window is scaled": (lambda h: h.at[:, :4].multiply(2.0), [1, 3, 6]),
    "a window is set": (lambda h: h.at[1:3, 2:6].set(jnp.sin(h[1:3, :4])), [0, 1, 2, 3, 4, 5]),
    "a window that goes": (lambda h: h.at[:, 2:6].add(1.0), [0, 1, 6]),
    "a column is set": (lambda h: h.at[:, 5].set(h[:, 2]), [1, 2, 5, 6]),
    "a column of one": (lambda h: h.at[:, 5:6].max(h[:, 2:3]), [1, 2, 5, 6]),
    "a window in each layer": (
        lambda h: lax.scan(lambda h, s: (h.at[:, 2:6].multiply(s), None), h, jnp.arange(1.0, 3))[0],
        [1, 3, 6],
    ),
    "gamma": (lambda h: h * jax.random.gamma(jax.random.key(0), jnp.exp(h)), [2, 3, 5]),
    "cholesky": (lambda h: along(jnp.linalg.cholesky)(h), [0, 3, 5]),
    "lu": (lambda h: along(lambda m: lax.linalg.lu(m)[0])(h), [0, 3, 5]),
    "svd": (lambda h: along(lambda m: jnp.linalg.svd(m)[1])(h), [0, 3, 5]),
    "eigh": (lambda h: along(lambda m: jnp.linalg.eigh(m)[0])(h), [0, 3, 5]),
    "qr": (lambda h: along(lambda m: jnp.abs(jnp.linalg.qr(m)[1]))(h), [0, 3, 5]),
    "solve for each": (lambda h: along(lambda m: lax.linalg.triangular_solve(m, m))(h), [0, 3, 5]),
    "solve for columns": (
        lambda h: lax.linalg.triangular_solve(
            jnp.tril(jnp.ones((len(h), len(h)))), h, left_side=True, lower=True
        ),
        [0, 3, 5],
    ),
    "solve for rows": (
        lambda h: (
            lax.linalg.triangular_solve(
                jnp.tril(jnp.ones((len(h), len(h)))), h.T, left_side=False, lower=True
            ).T
        ),
        [0, 3, 5],
    ),
    "update": (lambda h: jnp.zeros((9, 8)).at[: h.shape[0]].set(h)[: h.shape[0]], [1, 5]),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    between, kept = RULES[name]
    keep = check(between, kept)
    assert 0 < len(keep["down"][0]) < 8


def test_repeat_widens_units():
    keep = check(lambda h: jnp.repeat(h, 2, axis=1), [0, 3], hidden=4, width=8)
    assert keep["down"][0].tolist() == [0, 1, 6, 7]


def test_tiles_widen_units():
    keep = check(lambda h: jnp.tile(h, (1, 2)), [0, 3], hidden=4, width=8)
    assert keep["down"][0].tolist() == [0, 3, 4, 7]


def test_flatten_before_dense():
    """(4, 2) positions of each unit: a unit is rows 2u and 2u + 1 of the next kernel."""

    def between(h):
        return (h[:, :, None] * jnp.array([1.0, -1.0])).reshape(h.shape[0], -1)

    keep = check(between, [1, 2], hidden=4, width=8)
    assert keep["down"][0].tolist() == [2, 3, 4, 5]


def reason(fn, shapes, path, axis, *inputs):
    found = graph.dims(fn, params_of(shapes), *inputs)
    rows = found.labels.rows(found.leaves[path][axis])
    return set(found.reasons[rows[rows >= 0]])


def hidden_reason(between, down=8):
    fn = lambda p, x: between(x @ p["up"]) @ p["down"]
    return reason(fn, {"up": (3, 8), "down": (down, 2)}, "up", 1, jnp.ones((4, 3)))


@pytest.mark.parametrize(
    ("between", "because"),
    [
        (lambda h: jnp.sort(h, axis=-1), "it is sorted"),
        (lambda h: lax.top_k(h, 8)[0], "top_k gives positions along it"),
        (lambda h: h + jnp.argmax(h, axis=-1, keepdims=True), "argmax gives positions along it"),
        (lambda h: jnp.linalg.qr(h)[0] @ jnp.ones((4, 8)), "qr needs the whole matrix"),
        (
            lambda h: lax.linalg.triangular_solve(jnp.eye(8), h, left_side=False),
            "triangular_solve solves along it",
        ),
        (
            lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME"),
            "a window slides over it",
        ),
        (
            lambda h: h.at[:, jnp.int32(h[0, 0])].set(1.0),
            "it is written at indices that are values",
        ),
        (
            lambda h: lax.scatter(
                h,
                jnp.int32(h[:1, 0]),
                jnp.ones((4, 3)),
                lax.ScatterDimensionNumbers((0, 1), (), (1,)),
            ),
            "windows of it are written",
        ),
        (
            lambda h: h[:, jnp.int32(h[0, 0])][:, None] * jnp.ones(8),
            "an index that depends on values picks from it",
        ),
    ],
)
def test_what_ends_a_unit_is_named(between, because):
    assert because in hidden_reason(between)


COMPARED = {
    "one hot": lambda labels: jax.nn.one_hot(labels, 8),
    "another order": lambda labels: (jnp.arange(8)[:, None] == labels).T.astype(float),
    "an offset": lambda labels: jnp.where(jnp.arange(1, 9) - labels[:, None] > 0, 1.0, 0.0),
    "groups of two": lambda labels: (jnp.arange(8) // 2 < labels[:, None]).astype(float),
    "numpy": lambda labels: (labels[:, None] != np.arange(8)).astype(float),
    "vmap": jax.vmap(lambda label: (jnp.arange(8) <= label).astype(float)),
    "a loop": lambda labels: lax.fori_loop(
        0, 3, lambda k, mask: mask * (jnp.arange(8) != k), jnp.ones((4, 8))
    ),
}


@pytest.mark.parametrize("name", COMPARED)
def test_positions_that_are_compared_with_values_stay(name):
    fn = lambda p, x, labels: jnp.sum((x @ p["up"]) * COMPARED[name](labels), -1)
    found = reason(fn, {"up": (3, 8)}, "up", 1, jnp.ones((4, 3)), jnp.arange(4))
    assert found == {"its positions are compared with values"}


MADE = {
    "every other": lambda h: h * (jnp.arange(8) % 2 == 0),
    "numbers of neighbours": lambda h: h @ (jnp.arange(8)[:, None] >= jnp.arange(8)).astype(float),
    "triangle": lambda h: h @ jnp.tril(jnp.ones((8, 8))),
    "numpy": lambda h: h * (np.arange(8) < jnp.arange(8)[::-1]),
    "a constant in a loop": lambda h: lax.fori_loop(0, 3, lambda k, h: h * (jnp.arange(8) < 5), h),
    "thresholds": lambda h: h * (h > np.linspace(-1, 1, 8, dtype=np.float32)),
}


@pytest.mark.parametrize("name", MADE)
def test_positions_may_be_compared_with_constants(name):
    assert hidden_reason(MADE[name]) == {""}


def test_an_index_picked_alone_stays_and_others_may_go():
    found = hidden_reason(lambda h: h * h[:, 2:3])
    assert found == {"", "an index of it is picked alone"}
    found = hidden_reason(lambda h: h.at[:, 2].set(0.0))
    assert found == {"", "an index of it is written alone"}


def test_inputs_and_outputs_are_named():
    fn = lambda p, a, b: a @ p["up"] @ p["down"] + b
    inputs = jnp.ones((4, 3)), jnp.ones((4, 2))
    assert reason(fn, W, "up", 0, *inputs) == {"it is tied to axis 1 of input 0"}
    assert reason(fn, W, "down", 1, *inputs) == {"it is tied to axis 1 of input 1"}
    assert reason(lambda p, x: x @ p["up"], {"up": (3, 8)}, "up", 1, jnp.ones((4, 3))) == {
        "it is axis 1 of output 0"
    }


def test_inputs_and_outputs_are_named_by_their_paths():
    def fn(p, x, state, *, bias):
        h = x @ p["up"] + state["cache"]["h"]
        return {"y": h, "rest": (state["other"], h @ p["down"] + bias)}

    state = {"cache": {"h": jnp.ones((4, 8))}, "other": jnp.ones(2)}
    found = graph.dims(fn, params_of(W), jnp.ones((4, 3)), state, bias=jnp.ones(2))
    because = lambda path, axis: set(found.reasons[found.labels.find(found.leaves[path][axis])])
    assert because("up", 0) == {"it is tied to axis 1 of input 0"}
    assert because("up", 1) == {"it is tied to axis 1 of input 1/cache/h"}
    assert because("down", 1) == {"it is tied to axis 0 of input bias"}
    only = lambda p, x: {"y": x @ p["up"]}
    assert reason(only, W, "up", 1, jnp.ones((4, 3))) == {"it is axis 1 of output y"}


def test_conv_groups_go_with_their_channels():
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=numbers)
        x = lax.conv_general_dilated(
            x, p["grouped"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
        )
        return x.sum((1, 2)) @ p["head"]

    params = params_of({"first": (1, 1, 2, 8), "grouped": (3, 3, 4, 6), "head": (6, 2)})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 2)), jnp.float32)
    found = graph.dims(fn, params, x)
    rows = found.labels.rows(found.leaves["first"][3])
    assert rows.shape == (8, 2)  # (group, channel of it)
    keep = {"first": {3: np.array([0, 2, 4, 6])}, "grouped": {2: np.array([0, 2])}}
    small = dict(params, first=params["first"][..., ::2], grouped=params["grouped"][:, :, ::2])
    shapes = {name: leaf.shape for name, leaf in params.items()}
    np.testing.assert_allclose(
        graph.resize(fn, keep, shapes)(small, x), graph.remask(fn, keep)(params, x), rtol=1e-5
    )


def test_a_rule_of_your_own():
    primitive = jax.extend.core.Primitive("test_twice")
    primitive.def_impl(lambda x: 2 * x)
    primitive.def_abstract_eval(lambda x: x)
    assert hidden_reason(primitive.bind) == {"test_twice has no rule"}

    @graph.register_dims("test_twice")
    class Twice:
        def follow(self, step):
            return [step.operands[0]]

    assert hidden_reason(primitive.bind) == {""}


def test_indices_that_tear_a_tie_apart_are_refused():
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    keep = {"up": {1: np.array([0, 1])}, "down": {0: np.array([0, 2])}}
    small = {"up": jnp.ones((3, 2)), "down": jnp.ones((2, 2))}
    shapes = {"up": (3, 8), "down": (8, 2)}
    with pytest.raises(ArgumentError, match="which go with what is kept of the other leaves"):
        graph.resize(fn, keep, shapes)(small, jnp.ones((1, 3)))
