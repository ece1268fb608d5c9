"""GPTQ against the paper's algorithm in NumPy: float64, column by column, without blocks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress import errors, numerics, quantize
from jaxcompress.numerics import (
    MSE,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    binary_basis,
    float8_e4m3fn,
    int3,
    int4,
    nf4,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

IN, OUT, GROUP = 24, 10, 8
BLOCK = 8  # several blocks
FORMAT = Format(int4, PerGroup(GROUP))


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(2).standard_normal((IN, OUT)).astype(np.float32)


@pytest.fixture(scope="module")
def x():
    """Correlated inputs of different sizes, in no order."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, IN)) @ rng.standard_normal((IN, IN)) * rng.uniform(0.2, 2, IN)
    return (x + 2 * rng.standard_normal((200, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def hessian(x):
    return x.T @ x / len(x)


# --- The reference ----------------------------------------------------------------------------


def fit(rows, format):
    """Find the scale and zero point of each column of a group, or one for all, from its ends."""
    axis = None if isinstance(format.granularity, PerTensor) else 0
    low, high = rows.min(axis, keepdims=True), rows.max(axis, keepdims=True)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    least, most = format.limits
    if format.symmetric:
        return np.maximum(-low, high)[0] / most, 0.0
    scale = (high - low)[0] / (most - least)
    return scale, np.clip(np.round(-low[0] / scale) + least, least, most)


def to_codes(t, zero, format):
    least, most = format.limits
    if format.qtype == nf4:
        return np.abs(t[:, None] - np.asarray(nf4.levels)).argmin(1)
    if format.qtype == float8_e4m3fn:
        return np.clip(t, least, most).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.clip(np.round(t) + zero, least, most)


def to_numbers(codes, scale, zero, format):
    t = np.asarray(nf4.levels)[codes] if format.qtype == nf4 else codes - zero
    return t * scale


def reference(w, hessian, format, *, act_order, static_groups, damping=0.01):
    """Algorithm 1, with the dead inputs, activation order and groups of the authors' code."""
    w, h = w.astype(np.float64), hessian.astype(np.float64)
    dead = h.diagonal() == 0
    order = np.argsort(-h.diagonal(), kind="stable") if act_order else np.arange(IN)
    h[dead, dead] = 1
    w[dead] = 0
    h += damping * h.diagonal().mean() * np.eye(IN)
    size = format.granularity.size if isinstance(format.granularity, PerGroup) else IN
    fits = [fit(w[start : start + size], format) for start in range(0, IN, size)]
    w, h = w[order], h[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros((IN, OUT))
    for i in range(IN):
        group = order[i] // size
        if not static_groups and i % size == 0:
            fits[group] = fit(w[i : i + size], format)
        scale, zero = fits[group]
        row = to_codes(w[i] / scale, zero, format)
        codes[order[i]] = row
        error = (w[i] - to_numbers(row, scale, zero, format)) / upper[i, i]
        w[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
    return codes, fits


CASES = {
    "per channel": (Format(int4, PerChannel()), True, True),
    "per channel, in order": (Format(int4, PerChannel()), False, True),
    "per channel, asymmetric": (Format(int4, PerChannel(), symmetric=False), True, True),
    "per tensor": (Format(int4, PerTensor()), True, True),
    "groups": (Format(int4, PerGroup(GROUP)), False, False),
    "groups, asymmetric": (Format(int3, PerGroup(GROUP), symmetric=False), False, False),
    "groups larger than blocks": (Format(int4, PerGroup(12)), False, False),
    "groups smaller than blocks": (Format(int4, PerGroup(4)), False, False),
    "static groups": (Format(int4, PerGroup(GROUP)), False, True),
    "static groups, ordered": (Format(int4, PerGroup(GROUP)), True, True),
    "nf4 groups": (Format(nf4, PerGroup(GROUP)), False, False),
    "float8": (Format(float8_e4m3fn, PerChannel()), True, True),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_the_papers_loop(w, hessian, name):
    format, act_order, static_groups = CASES[name]
    q, info = quantize.gptq(
        w,
        hessian,
        format,
        block=BLOCK,
        act_order=act_order,
        static_groups=static_groups,
        refine=0,
    )
    codes, fits = reference(w, hessian, format, act_order=act_order, static_groups=static_groups)
    np.testing.assert_array_equal(np.asarray(q.values.astype(jnp.float32)).reshape(IN, OUT), codes)
    scales = np.stack([scale for scale, _ in fits])
    np.testing.assert_allclose(q.scale.reshape(scales.shape), scales, rtol=1e-4)
    assert q.values.dtype == format.qtype.storage and q.format == format
    assert bool(info["succeeded"]) and int(info["dead"]) == 0
    assert float(info["damping"]) == pytest.approx(0.01)


def output_error(w, q, x):
    return float(np.square(x @ (w - np.asarray(numerics.dequantize(q)))).sum())


@pytest.mark.parametrize(
    "format",
    [
        Format(int3, PerGroup(GROUP), range=MSE(), scale_dtype=jnp.bfloat16),
        Format(int4, PerGroup(GROUP), symmetric=False),
        Format(int3, PerTensor()),
        Format(nf4, PerGroup(GROUP)),
        Format(binary_basis(2), PerChannel()),
    ],
    ids=lambda format: f"{format.qtype.name}-{format.granularity}",
)
def test_outputs_are_closer_than_rounded_to_nearest_and_refining_helps(w, x, hessian, format):
    plain = output_error(w, numerics.quantize(w, format), x)
    found = [
        output_error(w, quantize.gptq(w, hessian, format, block=BLOCK, refine=n)[0], x)
        for n in (0, 1, 2)
    ]
    assert found[0] < 0.7 * plain
    assert found[2] <= found[1] * 1.005 <= found[0] * 1.01
    assert found[2] < 0.999 * found[0]


def test_refining_never_raises_the_damped_objective(w, hessian):
    """The trace with `H + damping * mean * I`, pass by pass, and it stands still in the end."""
    format = FORMAT
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(IN)
    traces = []
    for refine in (0, 1, 2, 12):
        q, _ = quantize.gptq(w, hessian, format, block=BLOCK, refine=refine)
        error = w - np.asarray(numerics.dequantize(q), np.float64)
        traces.append(np.einsum("io,ij,jo", error, damped, error))
    assert traces[0] > traces[1] > traces[2] >= traces[3] * (1 - 1e-6)


def test_the_last_scale_is_the_least_squares_one(w, hessian):
    """Per channel, after a pass that changed no code: s = cᵀHw / cᵀHc."""
    format = Format(int4, PerChannel())
    q, _ = quantize.gptq(w, hessian, format, refine=30)
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(IN)
    codes = np.asarray(q.values.astype(jnp.float32), np.float64)
    best = np.einsum("io,ij,jo->o", codes, damped, w) / np.einsum(
        "io,ij,jo->o", codes, damped, codes
    )
    np.testing.assert_allclose(q.scale[0], best, rtol=1e-4)


# --- Hessians that are not what they should be -------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_get_zero_weights(w, x, act_order):
    x = x.copy()
    x[:, [0, 7]] = 0
    hessian, format = x.T @ x / len(x), FORMAT
    q, info = quantize.gptq(w, hessian, format, block=BLOCK, act_order=act_order, refine=0)
    assert int(info["dead"]) == 2 and not np.any(numerics.dequantize(q)[jnp.asarray([0, 7])])
    codes, _ = reference(w, hessian, format, act_order=act_order, static_groups=True)
    np.testing.assert_array_equal(np.asarray(q.values.astype(jnp.float32)).reshape(IN, OUT), codes)


@pytest.mark.parametrize("kind", ["nothing seen", "nan", "inf", "negative"])
def test_failures_round_to_nearest_and_say_so(w, hessian, kind):
    bad = {
        "nothing seen": 0 * hessian,
        "nan": np.where(np.eye(IN) * np.arange(IN) == 3, np.nan, hessian),
        "inf": np.where(np.eye(IN) * np.arange(IN) == 3, np.inf, hessian),
        "negative": -hessian,
    }[kind]
    format = FORMAT
    q, info = quantize.gptq(w, bad, format, block=BLOCK)
    assert not bool(info["succeeded"]) and float(info["damping"]) == 0
    plain = numerics.quantize(w, format)
    np.testing.assert_array_equal(q.values, plain.values)
    np.testing.assert_array_equal(q.scale, plain.scale)


def test_damping_rises_where_the_hessian_is_indefinite(w, hessian):
    values, vectors = np.linalg.eigh(hessian)
    values[0] = -0.05 * hessian.diagonal().mean()
    q, info = quantize.gptq(w, (vectors * values) @ vectors.T, FORMAT, block=BLOCK)
    assert bool(info["succeeded"]) and float(info["damping"]) == pytest.approx(0.1)
    assert np.isfinite(q.scale).all()


# --- As a method ------------------------------------------------------------------------------


def test_the_method_maps_over_a_stack_as_a_loop_would(w, x):
    method, format = quantize.GPTQ(block=BLOCK), FORMAT
    statistic = method.statistics["second_moment"]

    def see(x):
        return statistic.finalize(statistic.update(statistic.init(IN), jnp.asarray(x)))

    pairs = [(w, see(x)), (2 * w[::-1], see(x[:, ::-1])), (w, see(0 * x))]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *pairs)

    @jax.jit
    @jax.vmap
    def run(w, moment):
        return method(w, format, {"second_moment": moment})

    q, info = run(*stack)
    assert info["succeeded"].tolist() == [True, True, False]
    for i, (one, moment) in enumerate(pairs):
        alone, _ = method(jnp.asarray(one), format, {"second_moment": moment})
        np.testing.assert_array_equal(q.values[i], alone.values)
        np.testing.assert_allclose(q.scale[i], alone.scale, rtol=1e-5)
    direct, _ = quantize.gptq(w, x.T @ x / len(x), format, block=BLOCK)
    np.testing.assert_array_equal(direct.values, q.values[0])
    assert method.sequential and not quantize.GPTQ(sequential=False).sequential


def test_bfloat16_weights_keep_their_dtype(w, hessian):
    format = Format(int4, PerChannel())
    low = jnp.asarray(w).astype(jnp.bfloat16)
    q, _ = quantize.gptq(low, hessian, format, block=BLOCK, refine=0)
    wide, _ = quantize.gptq(low.astype(jnp.float32), hessian, format, block=BLOCK, refine=0)
    assert numerics.dequantize(q).dtype == jnp.bfloat16 and q.dtype == jnp.bfloat16
    np.testing.assert_array_equal(q.values, wide.values)
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: quantize.GPTQ(damping=0), errors.ArgumentError, "`damping`"),
        (lambda: quantize.GPTQ(block=0), errors.ArgumentError, "`block`.*positive"),
        (lambda: quantize.GPTQ(refine=-1), errors.ArgumentError, "`refine`.*passes"),
        (lambda: run(Format(int4), damping=0), errors.ArgumentError, "`damping`"),
        (lambda: run(Format(int4), damping=11), errors.ArgumentError, "`damping`"),
        (lambda: run(Format(int4), block=0), errors.ArgumentError, "`block`"),
        (lambda: run(Format(int4), refine=-3), errors.ArgumentError, "`refine`.*got -3"),
        (lambda: run(Format(int4), n=5), errors.ArgumentError, r"\(in, in\)"),
        (
            lambda: run(Format(int4, PerGroup(2)), static_groups=False),
            errors.ArgumentError,
            "act_order=False",
        ),
        (lambda: run(Format(int4, PerGroup(3))), errors.ArgumentError, "do not divide"),
        (lambda: quantize.GPTQ().alone(Format(int4)), errors.ArgumentError, r"quantize\.ptq"),
    ],
)
def test_misuse(call, error, says):
    with pytest.raises(error, match=says):
        call()


def run(format, n=4, **options):
    return quantize.gptq(jnp.ones((4, 2)), jnp.eye(n), format, **options)
