"""Kernels of convolutions, lookups and sorted experts, against the rounded numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contractions import ACTS, ASYMMETRIC, TOKEN, Case, check, nhwc
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
    int4,
    int8,
    nf4,
)

# --- Convolutions ---------------------------------------------------------------------------------


CONVS = {
    "same": ((3, 3, 2, 4), (2, 5, 6, 2), nhwc, 0, -1),
    "valid, strides": (
        (3, 2, 2, 4),
        (2, 6, 5, 2),
        functools.partial(nhwc, strides=(2, 3), padding="VALID"),
        0,
        -1,
    ),
    "padding to one side and away": (
        (2, 3, 2, 4),
        (2, 6, 5, 2),
        functools.partial(nhwc, padding=((2, 0), (-1, 3))),
        0,
        -1,
    ),
    "dilated window": (
        (3, 3, 2, 4),
        (2, 7, 7, 2),
        functools.partial(nhwc, rhs_dilation=(2, 3), padding=((1, 2), (3, 0))),
        0,
        -1,
    ),
    "dilated image": (
        (3, 2, 2, 4),
        (2, 4, 3, 2),
        functools.partial(nhwc, lhs_dilation=(2, 3), padding=((1, 2), (0, 1))),
        0,
        -1,
    ),
    "NCHW": (
        (4, 2, 3, 3),
        (2, 2, 5, 6),
        functools.partial(nhwc, numbers=("NCHW", "OIHW", "NCHW")),
        0,
        -4,
    ),
    "any layout": (
        (3, 4, 3, 2),
        (5, 2, 6, 3),
        functools.partial(nhwc, numbers=("HCWN", "HOWI", "NWCH"), strides=(2, 1)),
        3,
        -3,
    ),
    "one dimension": (
        (3, 2, 4),
        (2, 7, 2),
        functools.partial(nhwc, strides=(2,), numbers=("NWC", "WIO", "NWC")),
        0,
        -1,
    ),
    "feature groups": (
        (3, 3, 2, 6),
        (2, 5, 5, 4),
        functools.partial(nhwc, feature_group_count=2),
        0,
        -1,
    ),
    "depthwise": (
        (3, 3, 1, 4),
        (2, 5, 5, 4),
        functools.partial(nhwc, feature_group_count=4, strides=(2, 2)),
        0,
        -1,
    ),
    "many channels": ((3, 3, 20, 4), (2, 4, 4, 20), nhwc, 0, -1),
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_convolutions(act):
    """On CPU few channels are gathered as patches; the same is convolved for other backends."""
    cases = {}
    for name, (weights, x, run, batch, out) in CONVS.items():
        grouped = "feature_group_count" in getattr(run, "keywords", {})
        kernel = "codes" if name == "many channels" else "codes as patches"
        kernel = "dequantized" if grouped else kernel
        for kind, format in {
            "tensor": Format(int8),
            "outputs": Format(int8, PerChannel((out,))),
        }.items():
            cases[f"{name}, {kind}"] = Case(
                run=run,
                weights=weights,
                format=format,
                x=x,
                kept=(batch,),
                act=ACTS[act],
                kernel=kernel if ACTS[act] else "weights",
            )
    check(cases)
    if act == "asymmetric":  # which has borders and zero points to go wrong
        by_codes = {k: dataclasses.replace(c, kernel="codes") for k, c in cases.items()}
        check(by_codes, backend="tpu")


def test_convolutions_that_take_arrays():
    outputs = Format(int8, PerChannel(), symmetric=False)
    base = functools.partial(Case, run=nhwc, weights=(3, 3, 2, 4), x=(2, 4, 4, 2), kept=(0,))
    cases = {
        "zero points": base(format=outputs, act=TOKEN, kernel="dequantized"),
        "zero points, floats": base(format=outputs, kernel="weights"),
        "scales of inputs": base(format=Format(int8, PerChannel((2,))), kernel="dequantized"),
        "groups": base(format=Format(int8, PerGroup(2)), act=TOKEN, kernel="dequantized"),
        "one group": base(format=Format(int8, PerGroup(2)), kernel="dequantized"),
    }
    check(cases)


# --- Lookups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [
    Format(int8, PerChannel((0,))),
    Format(int8, PerChannel(), symmetric=False),
    Format(int4, PerGroup(2, -1)),
    Format(nf4, PerGroup(2, -1)),
])  # fmt: skip
def test_lookups(format):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    q = numerics.quantize(table, format)
    index = jnp.array([[0, 5, -1], [-6, 6, 99]])  # the last two are out of bounds

    def fn(p, index):
        t = p["t"]
        return {
            "default": t[index],
            "take": jnp.take(t, index, axis=0),
            "clip": t.at[index].get(mode="clip"),
            "fill": t.at[index].get(mode="fill", fill_value=7),
            "bfloat16": t.astype(jnp.bfloat16)[index],
            "columns": t.T[:, index],
            "experts": jax.vmap(lambda t, i: t[i], in_axes=(None, 0))(t, index),
        }

    got, expected = jax.jit(
        lambda q, index: (
            quantize.execute(fn)({"t": q}, index),
            fn({"t": numerics.dequantize(q)}, index),
        )
    )(q, index)
    assert {u.kernel for u in quantize.site_kernels(fn, {"t": q}, index)} == {"rows"}
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jnp.isnan(expected["take"][1, 2]).all() and (expected["fill"][1, 2] == 7).all()


def test_lookups_that_take_arrays():
    """Indices are never rounded, whatever the activations of the leaf are."""
    rows = lambda t, i: t[i]
    at = lambda t, i: lax.dynamic_slice_in_dim(t, i[0], 2)
    entries = lambda t, i: t[i, i % 4]
    table = jnp.asarray(np.random.default_rng(0).normal(size=(300, 4)), jnp.float32)
    index = jnp.array([277, 3, 255])
    for act in (TOKEN, Format(int8, PerTensor())):
        q = numerics.quantize(table, Format(int8, PerGroup(4)))
        q = dataclasses.replace(q, activation=Activation(format=act))
        for look in (rows, at, entries):
            fn = lambda p, i, look=look: look(p["t"], i)
            (use,) = quantize.site_kernels(fn, {"t": q}, index)
            assert use.kernel == "dequantized" and use.why
            expected = look(numerics.dequantize(q), index)
            np.testing.assert_array_equal(quantize.execute(fn)({"t": q}, index), expected)


# --- ragged_dot -----------------------------------------------------------------------------------


def test_experts_of_sorted_tokens():
    sizes = (jnp.array([3, 0, 2]),)  # an expert without tokens, and a token without expert
    base = functools.partial(
        Case, run=lambda w, x, n: lax.ragged_dot(x, w, n), weights=(3, 8, 4), x=(6, 8), kept=(0,),
        others=sizes,
    )  # fmt: skip
    outputs = Format(int8, PerChannel((0, 2)))
    cases = {
        "floats": base(format=outputs, kernel="weights"),
        "codes": base(format=outputs, act=TOKEN, kernel="codes"),
        "one scale": base(format=Format(int8), act=TOKEN, kernel="codes"),
        "static": base(
            format=outputs, act=Format(int8, PerTensor()), static=(-2, 2), kernel="codes"
        ),
        "per tensor": base(format=outputs, act=Format(int8, PerTensor()), kernel="codes"),
        "float8": base(
            format=Format(float8_e4m3fn), act=Format(float8_e4m3fn, PerToken()), kernel="codes"
        ),
        "asymmetric": base(format=outputs, act=ASYMMETRIC, kernel="dequantized"),
        "zero points": base(
            format=Format(int8, PerChannel((0, 2)), symmetric=False), kernel="weights"
        ),
        "groups": base(format=Format(int4, PerGroup(4)), kernel="dequantized"),
        "bfloat16": base(format=outputs, act=TOKEN, dtype=jnp.bfloat16, kernel="codes"),
    }
    check(cases)
