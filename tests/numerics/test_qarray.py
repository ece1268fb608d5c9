"""QArray as a pytree, bad input, shapes and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import numerics, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor, QArray, int4, int8, nf4

GROUPED = Format(int4, PerGroup(4), symmetric=False)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (8, 6))


@pytest.fixture(scope="module")
def q(x):
    return numerics.quantize(x, GROUPED)


def test_layout_of_a_grouped_leaf(x, q):
    assert (q.shape, q.ndim, q.size) == ((8, 6), 2, 48)
    assert q.values.shape == (2, 4, 6) and q.scale.shape == q.zero.shape == (2, 1, 6)
    assert q.values.dtype == q.zero.dtype == jnp.int4
    assert q.nbytes == 48 // 2 + 12 * 4 + 12 // 2
    # A kernel contracts over both axes, and never reshapes what it has scaled.
    numbers = (q.values.astype(jnp.float32) - q.zero.astype(jnp.float32)) * q.scale
    inputs = jnp.ones((3, 8))
    product = jnp.einsum("bgi,gio->bo", inputs.reshape(3, 2, 4), numbers)
    np.testing.assert_allclose(product, inputs @ numerics.dequantize(q), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 6), (2, 2, 8, 6)])
@pytest.mark.parametrize(
    ("granularity", "scale_shape"),
    [
        (PerChannel(), lambda s: (*(1,) * (len(s) - 1), 6)),
        (PerChannel((0, -1)), lambda s: (s[0], *(1,) * (len(s) - 2), 6)),
        (PerGroup(4), lambda s: (*s[:-2], 2, 1, 6)),
        (PerGroup(3, axis=-1), lambda s: (*s[:-1], 2, 1)),
        (PerGroup(s := 2, axis=2), None),
    ],
    ids=["channel", "two axes", "group", "last axis", "axis 2"],
)
def test_leaves_of_more_axes(shape, granularity, scale_shape):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    q = numerics.quantize(x, Format(int8, granularity))
    assert q.shape == shape
    if scale_shape is not None:
        assert q.scale.shape == scale_shape(shape)
    step = np.asarray(q.scale).max()
    np.testing.assert_allclose(numerics.dequantize(q), x, atol=step * 0.501)


def test_tree_functions_see_one_leaf(x, q):
    params = {"mlp": {"kernel": q, "bias": jnp.zeros(6)}}
    assert tree.paths(params) == ["mlp/bias", "mlp/kernel"]
    assert tree.count(params) == 54 and tree.nbytes(params) == 24 + q.nbytes
    assert list(tree.select(params, tree.weights)) == ["mlp/kernel"]


@pytest.mark.parametrize("filler", [None, True, jax.ShapeDtypeStruct((2,), jnp.int8), "text"])
def test_anything_may_sit_in_its_places(q, filler):
    odd = jax.tree.map(lambda _: filler, q)
    assert isinstance(odd, QArray) and odd.values is filler
    assert isinstance(repr(odd), str)


def test_an_activation_rides_along(q):
    """It changes nothing of what the array stands for, and its arrays are counted."""
    for scale in (None, jnp.float32(0.5)):
        activation = numerics.Activation(format=Format(int8), scale=scale)
        with_it = dataclasses.replace(q, activation=activation)
        assert activation.is_static == (scale is not None)
        assert with_it.nbytes == q.nbytes + (0 if scale is None else 4)
        assert tree.nbytes({"w": with_it}) == with_it.nbytes and tree.paths({"w": with_it}) == ["w"]
        np.testing.assert_array_equal(numerics.dequantize(with_it), numerics.dequantize(q))
        doubled = tree.map_with_path(lambda _, leaf: leaf, {"w": with_it})["w"]
        assert doubled is with_it and jax.jit(lambda q: q)(with_it).activation.format == Format(
            int8
        )


def test_repr_says_what_it_stands_for(q):
    assert repr(q) == "QArray(float32[8,6] as int4, PerGroup(size=4, axis=-2))"


def test_it_goes_through_transformations(x, q):
    abstract = jax.eval_shape(lambda x: numerics.quantize(x, GROUPED), x)
    assert abstract.shape == q.shape and abstract.nbytes == q.nbytes
    doubled = jax.jit(lambda q: numerics.dequantize(q) * 2, donate_argnums=())(q)
    np.testing.assert_array_equal(doubled, numerics.dequantize(q) * 2)

    stack = jax.vmap(lambda x: numerics.quantize(x, GROUPED))(jnp.stack([x, -x]))
    _, slices = jax.lax.scan(lambda c, one: (c, numerics.dequantize(one)), 0, stack)
    np.testing.assert_array_equal(slices, numerics.dequantize(stack))


def test_donated_arrays_are_reused(q):
    copy = jax.tree.map(jnp.copy, q)
    out = jax.jit(lambda q: jax.tree.map(lambda a: a + jnp.ones_like(a), q), donate_argnums=0)(copy)
    assert copy.scale.is_deleted() and out.format == q.format


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, "data")], ids=str)
@pytest.mark.parametrize(
    "format",
    [
        *(GROUPED, Format(nf4, PerChannel()), numerics.nvfp4),
        Format(int4, PerTensor(), range=numerics.MSE(points=3)),
    ],
    ids=["int4-group", "nf4-channel", "nvfp4", "int4-mse"],
)
def test_sharded_equals_single_device(axis_type, spec, format):
    x = jax.random.normal(jax.random.key(1), (16, 16))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        q = numerics.quantize(sharded, format)
        y = numerics.dequantize(q)
        faked, gradient = jax.jit(
            jax.value_and_grad(lambda x: numerics.fake_quant(x, format).sum())
        )(sharded)
    expected = numerics.fake_quant(x, format)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(faked, expected.sum(), rtol=1e-5, atol=1e-4)
    assert gradient.sharding.is_equivalent_to(sharded.sharding, 2) or axis_type is AxisType.Auto


EXACT = [
    *(numerics.int2, numerics.int3, numerics.int4, numerics.int5, numerics.int6, numerics.int7),
    *(numerics.int8, numerics.float8_e4m3fn, numerics.float8_e5m2, nf4, numerics.ternary),
    *(
        numerics.float4_e2m1fn,
        numerics.binary,
        numerics.power_of_two(4),
        numerics.power_of_two(5, terms=2),
    ),
]


@pytest.mark.parametrize("qtype", EXACT, ids=lambda qtype: qtype.name)
def test_every_type_shards_explicitly(qtype):
    x = jax.random.normal(jax.random.key(1), (8, 8))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    format = Format(qtype, PerChannel())
    with jax.set_mesh(mesh):
        y = numerics.dequantize(numerics.quantize(sharded, format))
    np.testing.assert_array_equal(y, numerics.fake_quant(x, format))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "format", [Format(int8), GROUPED, Format(numerics.binary_basis(1))], ids=str
)
def test_non_finite_entries_are_refused_or_poison_the_slice(x, bad, format):
    x = x.at[2, 3].set(bad)
    for function in (numerics.quantize, numerics.fake_quant):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            function(x, format)
    inside = jax.jit(lambda x: numerics.fake_quant(x, format))(x)
    assert not np.isfinite(inside).all()


@pytest.mark.parametrize(
    ("x", "format", "error", "says"),
    [
        (np.ones((4, 4), np.int32), Format(int8), ArgumentTypeError, "int32"),
        (np.float32(1), Format(int8), ArgumentError, "scalar"),
        (np.ones((0, 4), np.float32), Format(int8), ArgumentError, "no entries"),
        (np.ones((6, 4), np.float32), Format(int4, PerGroup(4)), ArgumentError, "do not divide"),
        (np.ones(8, np.float32), Format(int4, PerGroup(4)), ArgumentError, "without axis -2"),
        (np.ones(8, np.float32), Format(int4, PerChannel((1,))), ArgumentError, "without axis 1"),
        (np.ones((4, 4), np.float32), int8, ArgumentTypeError, "numerics.Format"),
    ],
)
def test_unfit_arrays_are_refused_also_under_jit(x, format, error, says):
    for function in (numerics.quantize, numerics.fake_quant):
        with pytest.raises(error, match=says):
            function(x, format)
        with pytest.raises(error, match=says):
            jax.jit(lambda x, f=function: f(x, format))(x)


def test_misuse_is_named(x, q):
    with pytest.raises(ArgumentTypeError, match="QArray"):
        numerics.dequantize(x)
    with pytest.raises(ArgumentError, match="`key`"):
        numerics.quantize(x, Format(numerics.binary_basis(1)), key=jax.random.key(0))
    with pytest.raises(ArgumentError, match="`zero`"):
        numerics.quantize(x, GROUPED, scale=q.scale)
    with pytest.raises(ArgumentError, match=r"`scale`.*\(2, 1, 6\)"):
        numerics.quantize(x, GROUPED, scale=jnp.ones(6), zero=q.zero)
    with pytest.raises(ArgumentError, match="`zero`"):
        numerics.quantize(x, Format(int4), scale=jnp.ones((1, 1)), zero=jnp.ones((1, 1)))


def test_errors_are_measured():
    x = jnp.asarray([3e30, 4e30])
    np.testing.assert_allclose(numerics.relative_error(x, jnp.zeros(2)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(numerics.sqnr(x, x * 1.1), 20.0, atol=1e-3)
    assert numerics.sqnr(x, x) == jnp.inf and numerics.relative_error(0 * x, 0 * x) == 0
    w = jax.random.normal(jax.random.key(0), (4096, 1))
    by_bits = [numerics.sqnr(w, numerics.quantize(w, Format(t))) for t in (numerics.int7, int8)]
    assert 5.5 < by_bits[1] - by_bits[0] < 6.5
