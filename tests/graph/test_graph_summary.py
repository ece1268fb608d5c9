"""The summary lists every leaf once, and its totals are its parts."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxcompress import graph, quantize
from jaxcompress.errors import ArgumentError


@pytest.fixture(scope="module")
def found():
    def fn(p, tokens):
        x = p["embed"][tokens]
        x = lax.scan(lambda c, w: (jnp.tanh(c @ w["kernel"]) * w["scale"], None), x, p["layers"])[0]
        return (x @ p["embed"].T) @ jnp.ones((7, 2))

    layers = {"kernel": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}
    params = {"embed": jnp.ones((7, 4)), "layers": layers, "spare": jnp.ones(2)}
    return graph.summary(fn, params, jnp.arange(5))


def test_rows(found):
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [
        "embed",
        "embed#1",
        "layers/kernel",
        "layers/scale",
        "spare",
        "(no leaf)",
    ]
    assert [rows[name].axes for name in ("embed", "embed#1", "layers/kernel")] == [
        "?0 -> 1",
        "1 -> 0",
        "s0 1 -> 2",
    ]
    assert rows["layers/kernel"].flops == 3 * 2 * 5 * 4 * 4
    assert (rows["layers/scale"].what, rows["layers/scale"].repeats) == ("in mul", 3)
    assert (rows["spare"].what, rows["spare"].bytes) == ("not read", 0)
    assert rows["(no leaf)"].flops == 2 * 5 * 7 * 2
    assert rows["embed#1"].params == 0  # counted at its first site


def test_totals_are_the_sums_of_their_parts(found):
    for key in ("params", "param_bytes", "flops", "bytes"):
        assert getattr(found, key) == sum(getattr(row, key) for row in found.rows)
    shares = found.as_dict()["rows"]
    for key in ("params_share", "flops_share", "bytes_share"):
        assert sum(row[key] for row in shares) == pytest.approx(1)


def test_it_prints_and_dumps(found):
    text = str(found)
    assert len(text.splitlines()) == len(found.rows) + 4
    assert "layers/kernel" in text and "3×4×4" in text
    assert json.loads(json.dumps(found.as_dict()))["rows"][2]["shape"] == [3, 4, 4]


def test_depth_sums_up_layers():
    params = {f"layer_{k}": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)} for k in range(3)}

    def fn(p, x):
        for layer in p.values():
            x = x @ layer["w"] + layer["b"]
        return x

    full = graph.summary(fn, params, jnp.ones((2, 4)))
    short = graph.summary(fn, params, jnp.ones((2, 4)), depth=1)
    assert [row.name for row in short.rows] == list(params)
    assert (short.rows[0].params, short.rows[0].what) == (20, "2 rows")
    assert (short.flops, short.bytes) == (full.flops, full.bytes)
    with pytest.raises(ArgumentError, match="depth"):
        graph.summary(fn, params, jnp.ones((2, 4)), depth=0)


def test_quantized_leaves_show_what_is_stored():
    params = {"w": jax.ShapeDtypeStruct((256, 8), "float32")}
    packed = jax.eval_shape(lambda p: quantize.pack(p, quantize.presets.int4_g128), params)
    fn = lambda p, x: x @ quantize.unpack(p)["w"]
    (row,) = graph.summary(fn, packed, jax.ShapeDtypeStruct((2, 256), "float32")).rows
    assert row.dtype.startswith("int4 + ") and row.shape == (256, 8)
    assert row.param_bytes == packed["w"].nbytes < 4 * 256 * 8 / 6


def test_a_function_without_params_has_an_empty_summary():
    found = graph.summary(lambda p, x: x, {}, jnp.ones(2))
    assert found.rows == () and "all" in str(found)
