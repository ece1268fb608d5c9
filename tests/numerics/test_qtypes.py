"""Number types against NumPy and ml_dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError
from jaxcompress.numerics import Basis, Codebook, Format, Int, PerChannel, PerGroup
from jaxcompress.tree import nbytes

FLOATS = [numerics.float4_e2m1fn, numerics.float8_e4m3fn, numerics.float8_e5m2]


@pytest.mark.parametrize("qtype", FLOATS, ids=str)
def test_floats_round_as_ml_dtypes_does(qtype):
    every = np.arange(2**qtype.bits, dtype=np.uint8).view(qtype.storage).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)])
    halfway = (finite[1:] + finite[:-1]) / 2
    random = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    t = np.concatenate([finite, halfway, np.nextafter(halfway, 0), random, random * 1e-3])
    t = t[np.abs(t) <= finite[-1]].astype(np.float32)
    expected = t.astype(qtype.storage).astype(np.float32)
    got = jax.jit(lambda t: qtype.decode(qtype.encode(t).astype(qtype.storage)))(t)
    np.testing.assert_array_equal(got, expected)


def test_nf4_levels_are_the_normal_quantiles_of_the_paper():
    from scipy.stats import norm

    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2  # appendix E of arXiv:2305.14314, as bitsandbytes has it
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0, *negative])
    np.testing.assert_allclose(numerics.nf4.levels, levels / levels.max(), atol=1e-6)


@given(t=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_codebook_of_many_levels_equals_the_one_of_few(t):
    # 33 levels go by bisection and gather, 17 by comparisons and selects; both are "nearest".
    few = Codebook(name="few", bits=4, levels=tuple(np.linspace(-1, 1, 16).tolist()))
    many = Codebook(name="many", bits=6, levels=tuple(np.linspace(-1, 1, 46).tolist()))
    t = np.pad(np.asarray(t, np.float32), (0, 20 - len(t)))
    for qtype in (few, many):
        levels = np.asarray(qtype.levels, np.float32)
        decoded = qtype.decode(qtype.encode(jnp.asarray(t)).astype(qtype.storage))
        nearest = np.abs(t[:, None] - levels).min(-1)
        np.testing.assert_allclose(np.abs(np.asarray(decoded) - t), nearest, atol=1e-7)


def test_power_of_two_levels():
    one = numerics.power_of_two(4).levels
    assert one[8:] == tuple(2.0**-e for e in range(6, -1, -1)) and one[7] == 0
    two = np.asarray(numerics.power_of_two(5, terms=2).levels)
    sums = {a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)}
    np.testing.assert_allclose(two[two >= 0], np.sort(list(sums)) / 1.5)
    np.testing.assert_array_equal(two, -two[::-1])


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Int(name="int1", bits=1), "bits"),
        (lambda: Int(name="int9", bits=9), "bits"),
        (lambda: Basis(name="none", bits=0), "bits"),
        (lambda: numerics.binary_basis(9), "bits"),
        (lambda: numerics.power_of_two(4, terms=2), "bits"),
        (lambda: numerics.power_of_two(4, terms=3), "terms"),
        (lambda: Codebook(name="c", bits=2, levels=(0.0, -1.0, 1.0)), "levels"),
        (lambda: Codebook(name="c", bits=1, levels=(-1.0, 0.0, 1.0)), "levels"),
        (lambda: Codebook(name="c", bits=2, levels=(0.0, 1.0)), "levels"),
    ],
)
def test_impossible_types_are_refused(make, argument):
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == argument


def test_a_new_type_is_an_instance():
    fp4 = Codebook(
        name="fp4_e2m1", bits=4, levels=(-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    )
    x = jnp.asarray([[12.0, 5.2, -0.7]])
    np.testing.assert_allclose(numerics.fake_quant(x, Format(fp4)), [[12.0, 6.0, -1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("qtype", "expected"),
    [
        (numerics.int2, 64 * 32 // 4),
        (numerics.int3, 64 * 32 // 2),
        (numerics.int4, 64 * 32 // 2),
        (numerics.int8, 64 * 32),
        (numerics.nf4, 64 * 32 // 2),
        (numerics.ternary, 64 * 32 // 4),
        (numerics.float4_e2m1fn, 64 * 32 // 2),
        (numerics.float8_e5m2, 64 * 32),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_sizes_are_what_xla_keeps(qtype, expected):
    x = jnp.ones((64, 32))
    pack = jax.jit(lambda x: numerics.quantize(x, Format(qtype, PerChannel())))
    q = jax.eval_shape(pack, x)
    assert nbytes(q) == q.nbytes == expected + 32 * 4
    if qtype in (numerics.int4, numerics.int2, numerics.float4_e2m1fn):
        analysis = pack.lower(x).compile().memory_analysis()
        table = 8 * len(jax.tree.leaves(q))  # the output tuple's pointers
        assert q.nbytes <= analysis.output_size_in_bytes <= q.nbytes + table


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_basis_error_falls_with_bits_and_refinement(bits):
    x = jax.random.normal(jax.random.key(0), (64, 4))

    def error(bits, iterations):
        fit = numerics.LeastSquares(iterations)
        format = Format(numerics.binary_basis(bits), PerChannel(), range=fit)
        q = numerics.quantize(x, format)
        return np.square(numerics.dequantize(q) - x).sum(0), q

    once, q = error(bits, 1)
    often, _ = error(bits, 10)
    assert (often <= once * (1 + 1e-5)).all()
    if bits == 1:
        np.testing.assert_allclose(q.scale[..., 0], np.abs(x).mean(0, keepdims=True), rtol=1e-5)
    else:
        assert (often < error(bits - 1, 10)[0]).all()


def test_basis_recovers_a_slice_that_it_can_hold():
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(2, 32, 1))
    x = jnp.asarray(0.75 * signs[0] + 0.25 * signs[1], jnp.float32)
    q = numerics.quantize(x, Format(numerics.binary_basis(2), PerGroup(32)))
    np.testing.assert_allclose(numerics.dequantize(q), x, atol=1e-4)
    np.testing.assert_allclose(np.sort(np.abs(np.ravel(q.scale))), [0.25, 0.75], atol=1e-4)
