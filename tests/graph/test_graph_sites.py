"""Rows: an activation, a weight and a result brought to one matrix product, whatever the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import graph
from jaxcompress.graph import Axes, Factor, Layout, View, register_site, register_view

KEYS = jax.random.split(jax.random.key(0), 3)


def product(site, leaf):
    """The leaf as `(*batch, features, outputs)`, in the order of its own axes."""
    axes = site.axes
    batch, inside = (*axes.stacked, *axes.batch), sorted((*axes.contract, *axes.spatial))
    matrix = jnp.transpose(leaf, (*batch, *inside, *axes.output))
    sizes = [leaf.shape[k] for k in batch]
    features = np.prod([leaf.shape[k] for k in inside], dtype=int)
    return matrix.reshape(*sizes, features, -1)


EINSUMS = [
    ("bi,io->bo", (2, 4), (4, 5)),
    ("bi,oi->bo", (2, 4), (5, 4)),
    ("bti,ihd->bthd", (2, 3, 4), (4, 2, 5)),
    ("bthd,hdo->bto", (2, 3, 2, 5), (2, 5, 4)),
    ("bthd,dho->bto", (2, 3, 2, 5), (5, 2, 4)),
    ("ebi,eio->ebo", (3, 2, 4), (3, 4, 5)),
    ("bei,eoi->beo", (2, 3, 4), (3, 5, 4)),
    ("oi,bi->bo", (5, 4), (2, 4)),  # the leaf on the left
    ("eoi,bei->ebo", (3, 5, 4), (2, 3, 4)),
]


@pytest.mark.parametrize(("spec", "x_shape", "w_shape"), EINSUMS, ids=[e[0] for e in EINSUMS])
def test_rows_times_the_weight_are_the_output_rows(spec, x_shape, w_shape):
    left = spec.startswith(("oi", "eoi"))
    if left:
        x_shape, w_shape = w_shape, x_shape
    w, x = jax.random.normal(KEYS[0], w_shape), jax.random.normal(KEYS[1], x_shape)
    fn = lambda p, x: jnp.einsum(spec, p, x) if left else jnp.einsum(spec, x, p)
    (site,) = graph.trace(fn, w, x).sites
    seen, result = graph.tap(fn, "", at="input")(w, x)[1][""], graph.tap(fn, "")(w, x)[1][""]
    rows, outs = site.rows(seen), site.output_rows(result)
    np.testing.assert_allclose(rows @ product(site, w), outs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows, site.channels(seen))


REARRANGED = {
    "split, contracted the other way": lambda w, x: jnp.einsum(
        "nji,ijc->nc", x.reshape(2, 3, 2), w.reshape(2, 3, 5)
    ),
    "merged the other way": lambda w, x: x @ w.reshape(2, 3, 5).transpose(1, 0, 2).reshape(6, 5),
    "outputs merged the other way": lambda w, x: (
        x
        @ w.T.reshape(5, 2, 3)
        .transpose(0, 2, 1)
        .reshape(5, 6)
        .T.reshape(3, 2, 5)
        .transpose(1, 0, 2)
        .reshape(6, 5)
    ),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_features_follow_the_leaf_however_it_is_rearranged(name):
    fn, w = REARRANGED[name], jax.random.normal(KEYS[0], (6, 5))
    x = jax.random.normal(KEYS[1], (2, 6))
    (site,) = graph.trace(fn, w, x).sites
    seen = graph.tap(fn, "", at="input")(w, x)[1][""]
    assert site.aligned
    result = graph.tap(fn, "")(w, x)[1][""]
    np.testing.assert_allclose(site.rows(seen) @ w, site.output_rows(result), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[::-1],
        lambda w: w[:, :3],
        lambda w: w[jnp.array([3, 0, 1, 2])],
        lambda w: jnp.concatenate([w, w], axis=1),
        lambda w: jnp.pad(w, ((0, 0), (1, 0))),
        lambda w: jnp.tile(w, (1, 2)),
        lambda w: jnp.repeat(w, 2, axis=1),
        lambda w: jnp.stack([w, w], axis=1).reshape(4, -1),
        lambda w: jnp.diag(w[:, 0]),
    ],
    ids=[
        "reversed",
        "sliced",
        "permuted",
        "joined",
        "padded",
        "tiled",
        "repeated",
        "stacked",
        "diagonal",
    ],
)
def test_a_site_says_when_its_features_are_not_the_leaf_s(change):
    fn = lambda w, x: x @ change(w)
    sites = graph.trace(fn, jnp.ones((4, 5)), jnp.ones((2, 4))).sites
    assert sites and not any(site.aligned for site in sites)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"window_strides": (2, 1)},
    "padded": {"padding": ((1, 2), (0, 1))},
    "dilated": {"rhs_dilation": (1, 2)},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))},
    "grouped": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
    "torch": {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_kernel_are_the_output_rows(name):
    options = {"window_strides": (1, 1), "padding": "SAME", **CONVOLUTIONS[name]}
    options.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    groups = options.get("feature_group_count", 1)
    x, w = jax.random.normal(KEYS[0], (2, 5, 6, 4)), jax.random.normal(KEYS[1], (3, 2, 4, 8))
    w = w[:, :, : 4 // groups]
    if name == "torch":
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    fn = lambda w, x: lax.conv_general_dilated(x, w, **options)
    (site,) = graph.trace(fn, w, x).sites
    rows, outs = site.rows(x), site.output_rows(fn(w, x))
    kernel = product(site, w)  # (features, outputs)
    if groups > 1:  # the outputs of a group read only its own channels
        kernel = kernel.reshape(kernel.shape[0], groups, -1).swapaxes(0, 1)
    np.testing.assert_allclose(rows @ kernel, outs, rtol=1e-4, atol=1e-5)
    channels = site.channels(x)
    assert channels.shape == ((groups,) if groups > 1 else ()) + (60, 4 // groups)
    last = x if name != "torch" else x.transpose(0, 2, 3, 1)
    got = np.moveaxis(np.asarray(channels).reshape(groups, 60, -1), 0, 1).reshape(60, 4)
    np.testing.assert_array_equal(got, last.reshape(60, 4))


def test_rows_of_a_lookup_are_its_indices_and_what_it_picks():
    table, tokens = jax.random.normal(KEYS[0], (7, 5)), jnp.array([[3, 1], [0, 6]])
    fn = lambda w, tokens: jnp.take(w, tokens, axis=0)
    (site,) = graph.trace(fn, table, tokens).sites
    seen = graph.tap(fn, "", at="input")(table, tokens)[1][""]
    indices = site.rows(seen)
    assert indices.tolist() == [[3], [1], [0], [6]]
    np.testing.assert_array_equal(site.output_rows(fn(table, tokens)), table[indices[:, 0]])


# --- views ---------------------------------------------------------------------------------------


def following(fn, shape):
    """What a one-operand function of a leaf shows of it, read off a contraction with everything."""

    def contracted(w, x):
        y = fn(w)
        return lax.dot_general(y, x.reshape(y.shape), (((), ()), ((), ())))

    w = jax.ShapeDtypeStruct(shape, "float32")
    out = jax.eval_shape(fn, w)
    (site,) = graph.trace(
        contracted, w, jax.ShapeDtypeStruct((np.prod(out.shape),), "float32")
    ).sites
    return site


@pytest.mark.parametrize(
    ("fn", "output", "sliced"),
    [
        (lambda w: w[1], (1, 2), (0,)),
        (lambda w: w[:, ::2, None], (0, 1, 2), ()),
        (lambda w: w.reshape(12, 5)[:, 0], (0, 1), (2,)),
        (lambda w: w.reshape(2, 30), (0, 1, 2), ()),
        (lambda w: jnp.pad(w, 1), (0, 1, 2), ()),
        (lambda w: w[jnp.array([2, 0])], (0, 1, 2), ()),
        (lambda w: w.max(axis=1), (0, 2), (1,)),
        (lambda w: jnp.broadcast_to(w[:1], (7, 4, 5)), (1, 2), (0,)),
        (lambda w: jnp.split(w, [1, 3], axis=1)[1], (0, 1, 2), ()),
        (lambda w: jnp.where(w > 0, w, 0), (0, 1, 2), ()),
        (lambda w: jnp.roll(w, 1, axis=2), (0, 1, 2), ()),
    ],
    ids=[
        "index",
        "strided",
        "merged and indexed",
        "resplit",
        "padded",
        "picked",
        "reduced",
        "broadcast",
        "split",
        "masked",
        "rolled",
    ],
)
def test_a_leaf_is_followed(fn, output, sliced):
    site = following(fn, (3, 4, 5))
    assert (site.axes.output, site.axes.sliced) == (output, sliced)


# --- rules of one's own ---------------------------------------------------------------------------


def test_rules_for_new_primitives_are_used():
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    flip, quarter = Primitive("test_flip"), Primitive("test_quarter_dot")
    flip.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape[::-1], x.dtype))
    quarter.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))
    mlir.register_lowering(flip, mlir.lower_fun(lambda x: x.T, multiple_results=False))
    mlir.register_lowering(quarter, mlir.lower_fun(lambda x, w: x @ w / 4, multiple_results=False))
    fn = lambda p, x: quarter.bind(x, flip.bind(p))
    w, x = jnp.ones((5, 4)), jnp.ones((2, 4))
    assert not graph.trace(fn, w, x).sites and graph.trace(fn, w, x).uses

    @register_view("test_flip")
    def _(eqn, views, k):
        (view,) = views
        return [view and view.passed("test_flip", view.axes[::-1])]

    @register_site("test_quarter_dot")
    def _(eqn, operand, view, varies):
        assert view.axes[0] == (Factor((1,), 4),) and isinstance(view, View)
        return Layout(
            axes=Axes(contract=view.leaf_axes([0]), output=view.leaf_axes([1])),
            flops=2 * 2 * 4 * 5,
            rows=lambda x: x,
            channels=lambda x: x,
            output_rows=lambda y: y,
            observed=lambda operands: operands[0],
        )

    (site,) = graph.trace(fn, w, x).sites
    assert site.axes == Axes(contract=(1,), output=(0,)) and site.through == ("test_flip",)
    doubled = graph.replay(fn, {"": lambda equation, x, w: equation.bind(2 * x, w)})
    np.testing.assert_array_equal(jax.jit(doubled)(w, x), jnp.full((2, 5), 2.0))


def test_rows_of_a_slice_are_those_that_are_read():
    fn = lambda w, start: lax.dynamic_slice_in_dim(w, start, 2)
    table = jax.random.normal(KEYS[0], (5, 3))
    (site,) = graph.trace(fn, table, 0).sites
    for start in (0, 2, 4, 9):
        rows = site.rows(jnp.int32(start))[:, 0]
        np.testing.assert_array_equal(table[rows], site.output_rows(fn(table, start)))
