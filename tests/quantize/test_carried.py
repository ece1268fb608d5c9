"""Codes follow what a function does to its array: each move against the same of the array."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

from jaxcompress import numerics, quantize
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor, float8_e4m3fn, int4, int8

FORMATS = {
    "tensor": Format(int8, PerTensor()),
    "outputs": Format(int8, PerChannel()),
    "asymmetric inputs": Format(int8, PerChannel((0,)), symmetric=False),
    "several axes": Format(float8_e4m3fn, PerChannel((0, -1))),
    "groups": Format(int4, PerGroup(2)),
    "asymmetric groups": Format(int4, PerGroup(2, -1), symmetric=False),
    "one group": Format(int4, PerGroup(4)),
}
FOLLOWED = "a result takes arrays"


def quantized(shape, format):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return numerics.quantize(jnp.asarray(w), format)


def why(move, q, *inputs):
    """What ended the way of the codes; `FOLLOWED` if nothing before fn did."""
    return {
        use.why
        for use in quantize.site_kernels(lambda p, *xs: move(p["w"], *xs), {"w": q}, *inputs)
    }


def check(move, q, *inputs):
    """Moving codes and scales gives, bit for bit, what moving the array gives."""
    fn = lambda p, *xs: move(p["w"], *xs)

    @jax.jit
    def both(q, *inputs):
        return quantize.execute(fn)({"w": q}, *inputs), move(numerics.dequantize(q), *inputs)

    got, expected = both(q, *inputs)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)


# --- Whatever is done -----------------------------------------------------------------------------


@st.composite
def factorizations(draw, size):
    """A shape of `size` entries, with an axis of 1 now and then."""
    shape = []
    while size > 1:
        divisors = [n for n in range(2, size + 1) if size % n == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    if draw(st.booleans()):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def moves(draw, shape):
    """A move of an array of this shape, and the shape that comes out."""
    kind = draw(st.sampled_from(["transpose", "reshape", "expand", "slice", "at", "split", "cast"]))
    if kind == "transpose":
        order = draw(st.permutations(range(len(shape))))
        return (lambda x: jnp.transpose(x, order)), tuple(shape[k] for k in order)
    if kind == "reshape":
        new = draw(factorizations(math.prod(shape)))
        return (lambda x: jnp.reshape(x, new)), new
    if kind == "expand":
        axis = draw(st.integers(0, len(shape)))
        return (lambda x: jnp.expand_dims(x, axis)), (*shape[:axis], 1, *shape[axis:])
    if kind == "cast" or not shape:
        return (lambda x: x.astype(jnp.bfloat16)), shape
    axis = draw(st.integers(0, len(shape) - 1))
    n = shape[axis]
    if kind == "split" and n % 2 == 0:
        which = draw(st.integers(0, 1))
        new = (*shape[:axis], n // 2, *shape[axis + 1 :])
        return (lambda x: jnp.split(x, 2, axis)[which]), new
    start = draw(st.integers(0, n - 1))
    size = draw(st.integers(1, n - start))
    new = (*shape[:axis], size, *shape[axis + 1 :])
    if kind == "at":  # at an index that is known when it runs
        at = lambda x: lax.dynamic_slice_in_dim(x, jnp.asarray(start), size, axis)
        return at, new
    return (lambda x: lax.slice_in_dim(x, start, start + size, axis=axis)), new


@hypothesis.given(
    st.data(),
    st.sampled_from([(4, 6), (2, 4, 6), (2, 4, 2)]),
    st.sampled_from(sorted(FORMATS)),
)
def test_any_moves(data, shape, name):
    chain = []
    for _ in range(data.draw(st.integers(1, 3))):
        move, shape_after = data.draw(moves(chain[-1][1] if chain else shape))
        chain.append((move, shape_after))

    def run(x):
        for move, _ in chain:
            x = move(x)
        return x

    q = quantized(shape, FORMATS[name])
    assert run(jnp.zeros(shape)).shape == chain[-1][1]
    check(run, q)


# --- What is followed, and what is not ------------------------------------------------------------

GROUPED, CHANNELS = FORMATS["groups"], FORMATS["outputs"]
FOLLOWS = {
    "transpose": (lambda x: x.T, GROUPED),
    "split an axis": (lambda x: x.reshape(2, 4, 6), CHANNELS),
    "split an axis at its groups": (lambda x: x.reshape(4, 2, 6), GROUPED),
    "split an axis across its groups": (lambda x: x.reshape(2, 4, 6), GROUPED),
    "split an axis inside its groups": (lambda x: x.reshape(4, 2, 1, 6), FORMATS["one group"]),
    "merge axes": (lambda x: x.reshape(48), GROUPED),
    "merge axes with a part": (lambda x: x.reshape(16, 3), CHANNELS),
    "merge and come back": (lambda x: x.reshape(-1).reshape(8, 6), GROUPED),
    "heads": (lambda x: x.reshape(8, 2, 3).transpose(1, 0, 2), GROUPED),
    "new axes": (lambda x: x[None, :, None], GROUPED),
    "no more axes of one": (lambda x: jnp.squeeze(x[None, :, None]), GROUPED),
    "slice of outputs": (lambda x: x[:, 2:5], GROUPED),
    "slice along a shared scale": (lambda x: x[3:5], CHANNELS),
    "slice along one group": (lambda x: x[3:5], Format(int4, PerGroup(8))),
    "slice along the scale's own axis": (lambda x: x[:, 1:], CHANNELS),
    "all of groups": (lambda x: lax.slice(x, (0, 1), (8, 4)), GROUPED),
    "split": (lambda x: jnp.split(x, [1, 3], axis=1), GROUPED),
    "chunks of a transpose": (lambda x: jnp.split(x.T, 3), GROUPED),
    "to bfloat16": (lambda x: x.astype(jnp.bfloat16), GROUPED),
}
STOPS = {
    "axes that cross": (lambda x: x.reshape(6, 8), CHANNELS, "reshape"),
    "slice of groups": (lambda x: x[2:4], GROUPED, "slice"),
    "split of groups": (lambda x: jnp.split(x, 2), GROUPED, "split"),
    "strides": (lambda x: x[::2], CHANNELS, "slice"),
    "repeats": (lambda x: jnp.broadcast_to(x, (2, 8, 6)), CHANNELS, "broadcast_in_dim"),
    "reversal": (lambda x: x[::-1], CHANNELS, "rev"),
    "to integers": (lambda x: x.astype(jnp.int32), CHANNELS, "convert_element_type"),
    "arithmetic": (lambda x: 2 * x, CHANNELS, "mul"),
    "two of them": (lambda x: jnp.concatenate([x, x]), CHANNELS, "concatenate"),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_is_followed(name):
    move, format = FOLLOWS[name]
    q = quantized((8, 6), format)
    assert why(move, q) == {FOLLOWED}
    check(move, q)


@pytest.mark.parametrize("name", STOPS)
def test_needs_the_array(name):
    move, format, primitive = STOPS[name]
    q = quantized((8, 6), format)
    assert why(move, q) == {f"{primitive} takes arrays"}
    check(move, q)


@pytest.mark.parametrize("start", [-20, -10, -1, 3, 7])
def test_indices_that_are_known_late_are_clamped_as_arrays_are(start):
    one = lambda x, k: lax.dynamic_slice(x, (k, 0), (2, 6))
    q = quantized((8, 6), FORMATS["asymmetric inputs"])
    assert why(one, q, jnp.int32(0)) == {FOLLOWED}
    check(one, q, jnp.int32(start))


def test_indices_into_groups_need_the_array():
    q = quantized((8, 6), GROUPED)
    one = lambda x, k: lax.dynamic_slice_in_dim(x, k, 2)
    assert why(one, q, jnp.int32(0)) == {"there is no kernel for dynamic_slice"}
    check(one, q, jnp.int32(3))


def test_layers_of_a_stack():
    pick = lambda x, k: (x[1], lax.dynamic_index_in_dim(x, k, keepdims=False))
    for format in (GROUPED, FORMATS["several axes"]):
        q = quantized((3, 4, 6), format)
        assert why(pick, q, jnp.int32(0)) == {FOLLOWED}
        check(pick, q, jnp.int32(2))


def test_codes_that_do_not_multiply_entry_by_entry_do_not_start():
    q = quantized((8, 6), Format(numerics.binary_basis(2), PerChannel()))
    assert why(lambda x: x.T, q) == {"binary_basis2 has no kernel"}
    check(lambda x: x.T, q)
