"""MX and NVFP4 against their definitions, written out in NumPy, block by block and bit by bit."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError
from jaxcompress.numerics import MSE, AbsMax, Format, LeastSquares, Percentile, PerGroup

pytestmark = pytest.mark.usefixtures("strict_promotion")

ELEMENTS = {  # name: dtype, exponent of its largest number, largest number
    "mxfp8": (ml_dtypes.float8_e4m3fn, 8, 448.0),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2, 6.0),
}
F32 = np.float32
NORMAL = 2.0**-126
quantize = jax.jit(numerics.quantize, static_argnums=1)


def mx_block(v, name):
    """OCP MX 1.0, section 6.3: the codes of one block and its scale's, as bytes."""
    largest = max(abs(float(x)) for x in v)
    dtype, emax, top = ELEMENTS.get(name, (None, 6, 127.0))
    exponent = math.frexp(largest)[1] - 1 - emax if largest else 0  # frexp is in [0.5, 1)
    scale = 2.0 ** max(exponent, -126)
    scaled = np.clip(np.asarray(v, np.float64) / scale, -top, top)
    codes = np.rint(scaled).astype(np.int8) if dtype is None else scaled.astype(F32).astype(dtype)
    return codes.view(np.uint8), F32(scale).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)


def assert_mx(x, name):
    q = quantize(jnp.asarray(x), getattr(numerics, name))
    values, scale = np.asarray(q.values).view(np.uint8), np.asarray(q.scale).view(np.uint8)
    assert values.shape == (x.shape[0] // 32, 32, x.shape[1]) and q.zero is q.global_scale is None
    for block, column in np.ndindex(values.shape[0], values.shape[2]):
        codes, exponent = mx_block(x[32 * block : 32 * block + 32, column], name)
        np.testing.assert_array_equal(values[block, :, column], codes)
        assert scale[block, 0, column] == exponent
    numbers = np.asarray(q.values).astype(np.float64) * np.asarray(q.scale).astype(np.float64)
    np.testing.assert_array_equal(
        numerics.dequantize(q), np.where(np.abs(numbers) < NORMAL, 0, numbers).reshape(x.shape)
    )


def hard_cases(top):
    """Two blocks of six columns: zeros, ties, the ends of float32, one outlier, random."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(F32)
    x[:32, 0] = 0
    x[0, 1], x[1:64, 1] = top, np.tile(np.arange(63) / 4 - 8, 1)  # many ties at scale 1
    x[:, 2] *= F32(1e38)
    x[:, 3] *= F32(2e-36)
    x[5, 4] = 1e4
    x[32:, 5] = F32(0.1) * np.resize([1, -1], 32)
    x[0, 5] = np.nextafter(F32(8), F32(0))  # its exponent is 2; a rounded log2 would say 3
    return x


@pytest.mark.parametrize("name", [*ELEMENTS, "mxint8"])
def test_mx_is_as_the_standard_says(name):
    assert_mx(hard_cases(ELEMENTS.get(name, (0, 0, 127.0))[2]), name)


FLOATS = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
@given(x=hnp.arrays(F32, (32, 2), elements=FLOATS))
def test_mx_of_any_floats(name, x):
    assert_mx(x, name)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_float32_subnormals_count_as_zero(name):
    x = jnp.full((32, 1), 1e-40).at[3].set(-1e-45)
    for function in (numerics.fake_quant, jax.jit(numerics.fake_quant, static_argnums=1)):
        np.testing.assert_array_equal(function(x, getattr(numerics, name)), 0 * np.zeros((32, 1)))


def nvfp4_reference(x):
    """arXiv:2509.25149, appendix B, with float32 arithmetic: codes, block scales, global scale."""
    overall = np.abs(x).max() * F32(1 / (6 * 448))
    blocks = x.reshape(-1, 16, x.shape[1])
    amax = np.abs(blocks).max(1, keepdims=True)
    scale = (amax * F32(1 / 6)) * (F32(1) / overall)
    smallest = F32(2.0**-9)  # e4m3's smallest subnormal, rather than 0
    scale = np.where(amax == 0, F32(1), np.maximum(scale, smallest)).astype(F32)
    scale = scale.astype(ml_dtypes.float8_e4m3fn)
    t = np.clip(blocks * (F32(1) / (scale.astype(F32) * overall)), -6, 6)
    return t.astype(ml_dtypes.float4_e2m1fn), scale, overall


def wide_range():
    """Blocks whose magnitudes cover and pass what e4m3 holds, one all zero."""
    x = np.random.default_rng(1).normal(size=(16 * 24, 3)).astype(F32)
    x *= np.repeat(F32(2.0) ** np.arange(0, -24, -1, dtype=F32), 16)[:, None]
    x[48:64] = 0
    return x


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e8m0fnu", "float8_e4m3fn"])
def test_gradients_of_gradients_pass_through_rounded_scales(dtype):
    squared = lambda s: numerics.round_scale(s, jnp.dtype(dtype)) ** 2
    assert jax.hessian(squared)(jnp.float32(0.3)) == 2


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-25, 3.0e37])
def test_nvfp4_is_as_its_definition_says(size):
    x = wide_range() * F32(size)
    q = quantize(jnp.asarray(x), numerics.nvfp4)
    codes, scale, overall = nvfp4_reference(x)
    np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), scale.view(np.uint8))
    assert q.global_scale.shape == (1, 1, 1) and q.global_scale == overall
    assert np.asarray(scale).view(np.uint8).max() == 0x7E  # 448: the block of the largest entry
    assert (np.asarray(scale, F32) < 2.0**-6).any()  # and subnormal scales
    numbers = codes.astype(F32) * (scale.astype(F32) * overall)
    np.testing.assert_array_equal(numerics.dequantize(q), numbers.reshape(x.shape))


@given(x=hnp.arrays(F32, (32, 2), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_nvfp4_scales_are_the_nearest_to_the_definition(x):
    """In float64, so that nothing hangs on the order of float32 operations."""
    x = np.where(np.abs(x) < 1e-25, F32(0), x)
    q = quantize(jnp.asarray(x), numerics.nvfp4)
    if not x.any():
        assert (np.asarray(numerics.dequantize(q)) == 0).all() and q.global_scale == 1
        return
    overall = float(q.global_scale.squeeze())
    np.testing.assert_allclose(overall, np.abs(x).max() / 2688, rtol=1e-6)
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float)[1:]
    amax = np.abs(x.reshape(2, 16, 2)).max(1, keepdims=True)
    wanted = amax / 6 / overall
    scale = np.asarray(q.scale, np.float64)
    nearest = np.abs(grid[:, None, None, None] - wanted).min(0)
    assert (np.abs(scale - wanted) <= nearest + 1e-6 * wanted)[amax > 0].all()
    assert (scale[amax == 0] == 1).all()


# --- Scales by themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float8_e8m0fnu, jnp.float8_e4m3fn])
def test_given_scales_round_as_ml_dtypes_does(dtype):
    ends = (2.0**-126, 2.0**126) if dtype == jnp.float8_e8m0fnu else (2.0**-9, 448)
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(*np.log(ends), size=500)).astype(F32)
    ties = np.array([0.75, 1.5, 3, 6, 1.0625, 1.1875, 9.5, 2.0**-9 * 1.5, *ends], F32)
    scales = np.concatenate([scales, ties])[None]
    format = Format(numerics.int8, numerics.PerChannel(), scale_dtype=dtype)
    q = quantize(jnp.zeros((2, scales.size)), format, scale=jnp.asarray(scales))
    np.testing.assert_array_equal(q.scale, scales.astype(dtype))


def test_learned_steps_may_be_powers_of_two():
    format = Format(numerics.int4, scale_dtype=jnp.float8_e8m0fnu)
    x, step = jnp.asarray([0.3, 9.0, -1.4]), jnp.asarray([0.6])
    y, (gx, gs) = jax.value_and_grad(lambda x, s: numerics.lsq(x, s, format).sum(), (0, 1))(x, step)
    np.testing.assert_array_equal(y, 0.5 + 3.5 - 1.5)
    np.testing.assert_array_equal(gx, [1, 0, 1])
    expected = ((1 - 0.6) + 7 + (-3 + 2.8)) / math.sqrt(3 * 7)
    np.testing.assert_allclose(gs, [expected], rtol=1e-5)
    with pytest.raises(ArgumentError, match="global_scale"):
        nested = Format(numerics.int4, scale_dtype=jnp.float8_e4m3fn, global_scale=True)
        numerics.lsq(x, step, nested)


GLOBAL_PARTS = [Percentile(90.0), MSE(points=9), AbsMax(), LeastSquares(2)]


@pytest.mark.parametrize("range", GLOBAL_PARTS, ids=lambda r: type(r).__name__)
def test_slice_by_slice_equals_at_once(range):
    """What a solver that goes along the blocks does, with the global scale found beforehand."""
    format = dataclasses.replace(numerics.nvfp4, range=range)
    x = jax.random.normal(jax.random.key(0), (64, 3))

    @jax.jit
    def by_slices(x):
        overall = numerics.fit_global_scale(x, format)

        def block(_, part):  # (16, 3), shared along axis 0
            scale, zero = numerics.fit_scale(part, format, shared=(0,), global_scale=overall[0])
            assert zero is None
            product = scale * overall[0]
            return _, (format.qtype.to_values(part, product, None, limits=format.limits), scale)

        return overall, *jax.lax.scan(block, 0, x.reshape(4, 16, 3))[1]

    overall, values, scale = by_slices(x)
    q = quantize(x, format)
    np.testing.assert_array_equal(q.global_scale, overall)
    np.testing.assert_array_equal(q.values, values)
    np.testing.assert_array_equal(q.scale.astype(jnp.float32), scale)
    again = quantize(x, format, global_scale=overall)  # the scales found for a given global scale
    jax.tree.map(np.testing.assert_array_equal, again, q)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_mse_finds_the_best_scale_of_its_grid(name):
    format = getattr(numerics, name)
    x = np.random.default_rng(2).standard_t(3, size=(64, 8)).astype(F32)
    x[:, 0] *= F32(1e30 if name != "nvfp4" else 1)
    absmax = quantize(jnp.asarray(x), format)
    clipped = quantize(jnp.asarray(x), dataclasses.replace(format, range=MSE(lowest=0.25)))

    def errors(q):
        off = (np.asarray(numerics.dequantize(q), np.float64) - x) / np.abs(x).max(0)
        return np.square(format.granularity.block(off)).sum(1, keepdims=True)

    assert (errors(clipped) <= errors(absmax) * (1 + 1e-6)).all()
    assert errors(clipped).sum() < errors(absmax).sum()
    if name == "nvfp4":
        assert absmax.global_scale == clipped.global_scale
        return
    # Twice, the same, half, a quarter of what the standard says; nothing else.
    tried = [
        errors(
            quantize(jnp.asarray(x), format, scale=absmax.scale.astype(jnp.float32) * F32(factor))
        )
        for factor in (2.0, 1.0, 0.5, 0.25)
    ]
    np.testing.assert_allclose(errors(clipped), np.min(tried, 0), rtol=1e-6)
    taken = np.asarray(clipped.scale, F32) / np.asarray(absmax.scale, F32)
    assert set(np.unique(taken)) <= {2.0, 1.0, 0.5, 0.25} and (taken == 2).any()


# --- Global scales as data --------------------------------------------------------------------


def test_stacks_have_a_global_scale_each():
    x = jax.random.normal(jax.random.key(1), (3, 32, 2)) * jnp.asarray([[[1.0]], [[1e3]], [[1e-3]]])
    stack = jax.vmap(lambda x: numerics.quantize(x, numerics.nvfp4))(x)
    assert stack.shape == (3, 32, 2) and stack.global_scale.shape == (3, 1, 1, 1)
    assert stack.nbytes == 3 * (32 * 2 // 2 + 4 + 4)
    assert numerics.effective_scale(stack).shape == stack.scale.shape
    _, scanned = jax.lax.scan(lambda _, q: (_, numerics.dequantize(q)), 0, stack)
    for i in range(3):
        one = numerics.quantize(x[i], numerics.nvfp4)
        np.testing.assert_array_equal(scanned[i], numerics.dequantize(one))
        np.testing.assert_array_equal(numerics.dequantize(stack)[i], numerics.dequantize(one))
    together = numerics.quantize(x, numerics.nvfp4)  # one array: one global scale
    assert together.global_scale.shape == (1, 1, 1, 1)
    assert numerics.relative_error(x[2], numerics.dequantize(together)[2]) > 0.2


def test_a_basis_has_its_effective_scale():
    format = Format(
        numerics.binary_basis(2), PerGroup(16), scale_dtype=jnp.float8_e4m3fn, global_scale=True
    )
    q = numerics.quantize(jax.random.normal(jax.random.key(2), (32, 2)) * 1e4, format)
    scale = numerics.effective_scale(q)
    assert scale.shape == (2, 1, 2, 2) and q.global_scale.shape == (1, 1, 1, 1)
    signs = 2.0 * ((np.asarray(q.values)[..., None].astype(int) >> np.arange(2)) & 1) - 1
    expected = (signs * np.asarray(scale)).sum(-1).reshape(32, 2)
    np.testing.assert_allclose(numerics.dequantize(q), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "mxint8", "nvfp4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_entries_poison_their_block(name, bad):
    x = jnp.ones((64, 2)).at[40, 1].set(bad)
    y = jax.jit(numerics.fake_quant, static_argnums=1)(x, getattr(numerics, name))
    assert not np.isfinite(y[40, 1])
    if name != "nvfp4":
        assert np.isnan(y[32:, 1]).all() and (y[:32] == 1).all() and (y[:, 0] == 1).all()


def test_sizes_are_what_xla_keeps():
    expected = {"mxfp8": 8.25, "mxfp8_e5m2": 8.25, "mxfp4": 4.25, "mxint8": 8.25, "nvfp4": 4.5}
    for name, bits in expected.items():
        pack = jax.jit(functools.partial(numerics.quantize, format=getattr(numerics, name)))
        x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        q = jax.eval_shape(pack, x)
        assert q.nbytes == 64 * 32 * bits / 8 + 4 * (name == "nvfp4")
    kept = pack.lower(x).compile().memory_analysis().output_size_in_bytes
    assert q.nbytes <= kept <= q.nbytes + 8 * len(jax.tree.leaves(q))  # the tuple's pointers


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: Format(numerics.int8, scale_dtype=jnp.bfloat16, global_scale=True), "global"),
        (lambda: dataclasses.replace(numerics.mxfp4, global_scale=True), "global"),
        (lambda: Format(numerics.int8, symmetric=False, scale_dtype="float8_e8m0fnu"), "scale_d"),
        (lambda: Format(numerics.nf4, range=LeastSquares(), scale_dtype="float8_e8m0fnu"), "scale"),
        (lambda: Format(numerics.int8, scale_dtype=jnp.float8_e5m2), "scale_dtype"),
        (lambda: AbsMax().fit(jnp.ones((16, 1)), shared=(0,), format=numerics.nvfp4), "global"),
        (lambda: numerics.fit_scale(jnp.ones((16, 1)), numerics.nvfp4, shared=(0,)), "global"),
        (
            lambda: numerics.fit_scale(
                jnp.ones((16, 1)), numerics.mxfp4, shared=(0,), global_scale=jnp.ones((1, 1))
            ),
            "global",
        ),
        (lambda: numerics.fit_global_scale(jnp.ones((8, 2)), numerics.nvfp4), "x"),
        (
            lambda: numerics.quantize(jnp.ones((16, 2)), numerics.nvfp4, scale=jnp.ones((1, 1, 2))),
            "global_scale",
        ),
        (
            lambda: numerics.quantize(jnp.ones((16, 2)), numerics.nvfp4, global_scale=1.0),
            "global_scale",
        ),
        (
            lambda: numerics.quantize(
                jnp.ones((32, 2)), numerics.mxfp4, global_scale=jnp.ones((1, 1, 1))
            ),
            "global_scale",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(call, argument):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument.startswith(argument)
