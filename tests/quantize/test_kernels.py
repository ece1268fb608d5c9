"""Kernels against the same contraction of the rounded numbers.

Two contract suites: geometries (how axes meet) with a few formats, and formats x granularities x
ways to round activations with one geometry. Each family of cases is one jitted function, since
compiling is what tests cost: the file has a budget of one minute, and stays within half of it on
a quiet core.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contractions import ACTS, ASYMMETRIC, TOKEN, UNSIGNED, Case, check, draw, nhwc
from jax import lax

from jaxcompress import numerics, quantize
from jaxcompress.numerics import (
    Activation,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    float8_e4m3fn,
    float8_e5m2,
    int4,
    int8,
    mxfp4,
    nf4,
)

# --- dot_general: how axes meet -------------------------------------------------------------------

# name -> (weights, x, contraction with weights second, axes of x that it keeps, grouped axis)
DOTS = {
    "matrix": ((8, 3), (5, 8), lambda w, x: x @ w, (0,), -2),
    "weights first": ((3, 8), (8, 5), lambda w, x: w @ x, (1,), -1),
    "vector": ((8, 3), (8,), lambda w, x: x @ w, (), -2),
    "transposed": ((3, 8), (5, 8), lambda w, x: x @ w.T, (0,), -1),
    "experts": ((2, 8, 3), (2, 5, 8), lambda w, x: jnp.einsum("emk,ekn->emn", x, w), (0, 1), -2),
    "experts first": (
        (3, 2, 8),
        (8, 5, 2),
        lambda w, x: jnp.einsum("nek,kme->enm", w, x),
        (1, 2),
        -1,
    ),
    "heads out": ((8, 2, 3), (5, 4, 8), lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (0, 1), -3),
    "heads in": ((2, 4, 3), (5, 2, 4), lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (0,), -2),
    "heads in, other order": (
        (2, 4, 3),
        (4, 5, 2),
        lambda w, x: jnp.einsum("kbh,hkd->db", x, w),
        (1,),
        -2,
    ),
    "merged": ((2, 4, 3), (5, 8), lambda w, x: x @ w.reshape(8, 3), (0,), -2),
    "unmerged": (
        (8, 3),
        (5, 2, 4),
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w.reshape(2, 4, 3)),
        (0,),
        -2,
    ),
    "sliced": ((8, 6), (5, 8), lambda w, x: x @ w[:, 1:4], (0,), -2),
    "nothing summed": ((1, 3), (5, 1), lambda w, x: x @ w, (0,), None),
    "axis of one": ((8, 1, 3), (5, 8, 1), lambda w, x: jnp.einsum("bdi,dih->bh", x, w), (0,), -3),
}  # fmt: skip
WEIGHTS = {
    "channels": lambda axis, ndim: Format(int8, PerTensor()),
    "groups": lambda axis, ndim: Format(int4, PerGroup(4, axis)),
    "asymmetric groups": lambda axis, ndim: Format(int8, PerGroup(2, axis), symmetric=False),
    "each input": lambda axis, ndim: Format(int8, PerChannel((axis,))),
}


@pytest.mark.parametrize("act", ACTS)
def test_how_axes_meet(act):
    cases = {}
    for name, kind in itertools.product(DOTS, WEIGHTS):
        weights, x, run, kept, axis = DOTS[name]
        if axis is None:
            axis, possible = -2, kind in ("channels", "each input")
        else:
            possible = True
        if possible:
            format = WEIGHTS[kind](axis, len(weights))
            varies = kind != "channels" and weights[axis] > 1
            cases[f"{name}, {kind}"] = Case(
                run=run,
                weights=weights,
                format=format,
                x=x,
                kept=kept,
                act=ACTS[act],
                kernel=("codes" if ACTS[act] else "weights") + (" in groups" if varies else ""),
            )
    check(cases)


# --- dot_general: formats x granularities x methods -----------------------------------------------

QTYPES = {
    "int8": (Format(int8), True),
    "int4": (Format(int4), True),
    "asymmetric int4": (Format(int4, symmetric=False), True),
    "nf4": (Format(nf4), False),
    "float8": (Format(float8_e4m3fn), None),
    "ternary": (Format(numerics.ternary), False),
}
GRANULARITIES = {"tensor": PerTensor(), "outputs": PerChannel(), "groups": PerGroup(8)}
METHODS = {
    "none": (None, None),
    "tokens": (TOKEN, None),
    "asymmetric tokens": (ASYMMETRIC, None),
    "tensor": (Format(int8, PerTensor()), None),
    "static": (Format(int8, PerTensor()), (-2.0, 1.5)),  # some are clipped
    "asymmetric static": (UNSIGNED, (-1.0, 2.5)),
    "float8": (Format(float8_e5m2, PerToken()), None),
}
PLAIN = functools.partial(Case, run=lambda w, x: x @ w, weights=(32, 3), x=(5, 32), kept=(0,))


def kernel_of(qtype, act, *, groups):
    """What is to multiply: integers by integers, float8 by float8, anything by floats."""
    if act is None:
        return "weights in groups" if groups else "weights"
    both = {True: "int", False: "none", None: "float"}[QTYPES[qtype][1]]
    same = both == ("float" if act.qtype is float8_e5m2 else "int")
    return "dequantized" if not same else "codes in groups" if groups else "codes"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formats_granularities_methods(dtype):
    narrow, cases = dtype == jnp.bfloat16, {}
    kinds = ("outputs", "groups") if narrow else GRANULARITIES
    methods = ("none", "tokens", "asymmetric static", "float8") if narrow else METHODS
    for qtype, kind, method in itertools.product(QTYPES, kinds, methods):
        act, static = METHODS[method]
        format = dataclasses.replace(QTYPES[qtype][0], granularity=GRANULARITIES[kind])
        kernel = kernel_of(qtype, act, groups=kind == "groups")
        cases[f"{qtype}, {kind}, {method}"] = PLAIN(
            format=format, act=act, static=static, dtype=dtype, kernel=kernel
        )
    cases["mxfp4"] = PLAIN(format=mxfp4, dtype=dtype, kernel="weights")  # one group of 32
    cases["mxfp8"] = PLAIN(
        format=numerics.mxfp8, act=Format(float8_e4m3fn, PerToken()), dtype=dtype, kernel="codes"
    )
    cases["nvfp4"] = PLAIN(format=numerics.nvfp4, dtype=dtype, kernel="weights in groups")
    check(cases)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_what_other_backends_choose_computes_the_same(backend):
    """float8 goes in as it is on GPUs, and convolutions by codes."""
    float8 = Format(float8_e4m3fn, PerToken())
    conv = functools.partial(Case, run=nhwc, weights=(3, 3, 2, 4), x=(2, 5, 5, 2), kept=(0,))
    cases = {
        "float8": PLAIN(format=Format(float8_e4m3fn), act=float8, kernel="codes"),
        "float8 in groups": PLAIN(
            format=Format(float8_e4m3fn, PerGroup(8)), act=float8, kernel="codes in groups"
        ),
        "floats by groups": PLAIN(format=Format(int4, PerGroup(8)), kernel="weights in groups"),
        "int8": conv(format=Format(int8, PerChannel()), act=ASYMMETRIC, kernel="codes"),
        "float8 conv": conv(format=Format(float8_e4m3fn), act=float8, kernel="codes"),
        "feature groups": Case(
            run=functools.partial(nhwc, feature_group_count=2),
            weights=(3, 3, 1, 4),
            x=(2, 5, 5, 2),
            kept=(0,),
            format=Format(int8, PerChannel()),
            act=UNSIGNED,
            kernel="codes",
        ),
    }
    check(cases, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "rows", "apart"),
    [("float32", 8, True), ("float32", 9, False), ("bfloat16", 4, True), ("bfloat16", 5, False)],
)
def test_gpus_sum_groups_apart_where_the_sums_are_smaller_than_the_weights(dtype, rows, apart):
    """Groups of 8: `rows` sums of 4 bytes for each, against 8 weights of the activation's dtype."""
    q = numerics.quantize(draw(32, 3), Format(int4, PerGroup(8)))
    run = quantize.execute(lambda w, x: x @ w, backend="gpu")
    jaxpr = jax.make_jaxpr(run)(dataclasses.replace(q, dtype=dtype), jnp.ones((rows, 32), dtype))
    (dot,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert dot.outvars[0].aval.shape == ((4, rows, 3) if apart else (rows, 3))


@pytest.mark.parametrize("act", [TOKEN, Format(int8, PerToken(), symmetric=False)])
def test_sums_of_many_extremes_fit(act):
    """4096 products of the largest codes, and of codes at the far ends of zero points."""
    w = jnp.concatenate([jnp.full((4096, 1), 1.0), jnp.full((4096, 1), -1.0)], 1)
    w = w.at[0].set(jnp.array([0.0, 0.0]))
    x = jnp.stack([jnp.full(4096, 2.0), jnp.full(4096, -2.0)])
    for symmetric in (True, False):
        q = numerics.quantize(w, Format(int8, PerChannel(), symmetric=symmetric))
        params = {"w": dataclasses.replace(q, activation=Activation(format=act))}
        fn = lambda p, x: x @ p["w"]
        assert [u.kernel for u in quantize.site_kernels(fn, params, x)] == ["codes"]
        got = jax.jit(quantize.execute(fn))(params, x)
        np.testing.assert_allclose(got, 2 * 4095 * np.array([[1, -1], [-1, 1]]), rtol=1e-5)


def test_sums_that_might_not_fit_are_not_tried():
    fn = lambda p, x: x @ p["w"]
    q = numerics.quantize(jnp.ones((2**18, 1)), Format(int8, PerChannel()))
    params = {"w": dataclasses.replace(q, activation=Activation(format=TOKEN))}
    (use,) = quantize.site_kernels(fn, params, jnp.ones((1, 2**18)))
    assert (use.kernel, use.why) == (
        "dequantized",
        "a sum of 262,144 products does not fit int32",
    )
    np.testing.assert_allclose(quantize.execute(fn)(params, jnp.ones((1, 2**18))), 2.0**18)
    grouped = numerics.quantize(jnp.ones((2**18, 1)), Format(int8, PerGroup(128)))
    params = {"w": dataclasses.replace(grouped, activation=Activation(format=TOKEN))}
    assert quantize.site_kernels(fn, params, jnp.ones((1, 2**18)))[0].kernel == "codes in groups"


def test_integer_and_complex_activations():
    """Numbers of nf4 are fractions, which integers must not cut; complex ones are not rounded."""
    fn = lambda p, x: lax.dot_general(
        x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.result_type(x, jnp.float32)
    )
    x = jnp.arange(-8, 8).reshape(2, 8)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    for format in (Format(nf4, PerChannel()), Format(nf4, PerGroup(4))):
        q = numerics.quantize(w, format)
        got = quantize.execute(fn)({"w": q}, x)
        np.testing.assert_allclose(got, x @ numerics.dequantize(q), rtol=1e-5, atol=1e-5)
    q = numerics.quantize(w, Format(int8, PerChannel()))
    q = dataclasses.replace(q, activation=Activation(format=TOKEN))
    z, product = x * (1 + 2j), lambda p, x: x @ p["w"]
    (use,) = quantize.site_kernels(product, {"w": q}, z)
    assert use.why == "the activation is complex, and stays as it is"
    got = quantize.execute(product)({"w": q}, z)
    np.testing.assert_allclose(got, z @ numerics.dequantize(q), rtol=1e-5, atol=1e-5)
