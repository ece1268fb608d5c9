"""Every elementwise primitive of the running JAX goes through sites, dims and replay."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import graph, quantize
from jaxcompress.graph.program import ARRANGES, ELEMENTWISE, PASSES, arrange

SHAPE = (2, 3)
MIXES = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "sort"}
"""Primitives whose results are shaped like their operands, but mix their entries."""


def equations_of(f, *args):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jaxpr = jax.make_jaxpr(f)(*args)
    except Exception:  # this function is not for such operands
        return []
    return getattr(jaxpr, "jaxpr", jaxpr).eqns


def shape_of(var):
    return getattr(var.aval, "shape", None)


def find_elementwise():
    """List the functions of `jax.lax` that are one primitive on one, two or three like operands."""
    found = {}
    for name, f in sorted(vars(lax).items()):
        if not callable(f) or name.startswith("_") or inspect.isclass(f):
            continue
        for dtype in (jnp.float32, jnp.int32, jnp.complex64):
            for count in (1, 2, 3):
                eqns = equations_of(f, *[jnp.ones(SHAPE, dtype)] * count)
                alike = len(eqns) == 1 and len(eqns[0].invars) == count
                if alike and [*map(shape_of, eqns[0].outvars)] == [SHAPE]:
                    found.setdefault(eqns[0].primitive.name, (f, count, dtype))
    return found


FOUND = find_elementwise()


def test_many_are_found():
    assert {"tanh", "atan", "sinh", "lgamma", "add", "atan2", "clamp", "integer_pow"} <= set(FOUND)
    assert len(FOUND) > 70


def test_each_is_known_or_said_to_mix_entries():
    assert set(FOUND) - ELEMENTWISE - PASSES == MIXES


def cast(x, dtype):
    return x.astype(dtype) if x.dtype != dtype else x


@pytest.mark.parametrize("name", sorted(set(FOUND) - MIXES))
def test_each_goes_through_sites_dims_and_replay(name):
    f, count, dtype = FOUND[name]

    def apply(x):
        y = f(*[cast(x, dtype)] * count)
        return cast(y.real if jnp.iscomplexobj(y) else y, jnp.float32)

    def fn(params, x):
        return apply(x @ apply(params["w"])) @ params["v"]

    params = {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    params["v"] = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    x = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = graph.capture(fn, params, x)
        if name in ("imag",):  # of a real number: zeros, whatever the leaf
            assert set(graph.trace(traced).uses) <= {"w"}
            return
        assert sorted(site.path for site in traced.sites) == ["v", "w"]
        dims = graph.dims(traced)
        hidden = dims.labels.find(dims.leaves["w"][1])
        np.testing.assert_array_equal(hidden, dims.labels.find(dims.leaves["v"][0]))
        assert not any(dims.reasons[hidden]), dims.reasons[hidden]
        replayed = graph.replay(fn, {"w": lambda equation, *xs: equation.bind(*xs)})
        assert str(jax.make_jaxpr(replayed)(params, x)) == str(jax.make_jaxpr(fn)(params, x))


def test_what_is_computed_from_a_leaf_by_any_of_them_is_quantized():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    fn = lambda p, x: x @ jnp.arctan(p["w"])
    found = quantize.ptq(fn, params, [jnp.ones((2, 8))], quantize.presets.int8_weights)
    assert [leaf.path for leaf in found.report.leaves] == ["w"]


def test_operands_that_pass_keep_their_places():
    """Result k of a `device_put` of several arrays is operand k, not whatever looks like it."""
    fn = lambda p, x: x @ jax.device_put((p["a"], p["b"]))[0]
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
    assert [s.path for s in graph.trace(fn, params, jnp.ones((2, 3))).sites] == ["a"]


@pytest.mark.parametrize("name", sorted(ARRANGES - {"reshape"}))
def test_axes_are_arranged_as_entries_are(name):
    """What `arrange` says of axes is what the primitive does to the entries, for a tall array."""
    x = np.arange(6).reshape(2, 1, 3)
    f = {
        "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (3, 4, 2), (2, 1, 0)),
        "squeeze": lambda x: lax.squeeze(x, (1,)),
        "transpose": lambda x: lax.transpose(x, (2, 0, 1)),
    }[name]
    (eqn,) = equations_of(f, x)
    axes = arrange(eqn, ["two", "one", "three"], lambda n: f"new {n}")
    expected = {
        "broadcast_in_dim": ["three", "new 4", "two"],
        "squeeze": ["two", "three"],
        "transpose": ["three", "two", "one"],
    }
    assert axes == expected[name] and eqn.primitive.name == name
