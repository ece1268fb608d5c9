"""What the tests of files share: QArrays of every format, and comparison bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics, tree
from jaxcompress.numerics import Format, PerChannel, PerGroup, QArray

RNG = np.random.default_rng(0)
KEPT = np.random.default_rng(1).random((8, 6)) < 0.4
BITMAP = 6  # bytes for 48 entries


def same(a, b):
    """Bit for bit, dtype for dtype; QArrays part by part."""
    assert type(a) is type(b) or (isinstance(a, np.ndarray) and isinstance(b, jax.Array))
    if isinstance(a, QArray):
        assert (a.format, np.dtype(a.dtype)) == (b.format, np.dtype(b.dtype))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(getattr(x, "dtype", np.dtype(int)), jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def same_trees(a, b):
    assert tree.paths(a) == tree.paths(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        same(x, y)


FORMATS = {
    "int8": (Format(numerics.int8, PerChannel()), 48),
    "int8 asymmetric": (Format(numerics.int8, PerChannel(), symmetric=False), 48),
    "uint8": (Format(numerics.uint8, symmetric=False), 48),
    "int7": (Format(numerics.int7), 42),
    "int6": (Format(numerics.int6), 36),
    "int5": (Format(numerics.int5), 30),
    "int4 grouped": (Format(numerics.int4, PerGroup(4)), 24),
    "int4 grouped asymmetric": (Format(numerics.int4, PerGroup(4), symmetric=False), 24),
    "int3": (Format(numerics.int3, PerGroup(2, axis=-1)), 18),
    "int2": (Format(numerics.int2, scale_dtype=jnp.bfloat16), 12),
    "float8_e4m3fn": (Format(numerics.float8_e4m3fn), 48),
    "float8_e5m2": (Format(numerics.float8_e5m2, PerChannel()), 48),
    "nf4": (Format(numerics.nf4, PerGroup(8), range=numerics.MSE(points=5)), 24),
    "ternary": (Format(numerics.ternary, PerChannel()), 10),
    "power_of_two": (Format(numerics.power_of_two(3)), 18),
    "binary": (Format(numerics.binary, range=numerics.Percentile(99.0)), 6),
    "basis": (Format(numerics.binary_basis(3), PerChannel()), 18),
    "float4": (Format(numerics.float4_e2m1fn, PerChannel()), 24),
    "mxfp8": (dataclasses.replace(numerics.mxfp8, granularity=PerGroup(4)), 48),
    "mxfp4": (dataclasses.replace(numerics.mxfp4, granularity=PerGroup(4)), 24),
    "nvfp4": (dataclasses.replace(numerics.nvfp4, granularity=PerGroup(4)), 24),
}
CAN_PRUNE = [name for name in FORMATS if name not in ("binary", "basis")]


def zero_code(format):
    levels = getattr(format.qtype, "levels", (0.0,))
    return levels.index(0.0) if 0.0 in levels else 0


def qarray(name, *, kept=None):
    """A QArray of random codes, those of pruned entries being 0's."""
    format, _ = FORMATS[name]
    qtype, storage = format.qtype, np.dtype(format.qtype.storage)
    states = len(qtype.levels) if isinstance(qtype, numerics.Codebook) else 2**qtype.bits
    blank = jax.eval_shape(format.granularity.block, jax.ShapeDtypeStruct((8, 6), jnp.float32))
    codes = RNG.integers(0, states, blank.shape)
    scale = (RNG.random(numerics.scale_shape((8, 6), format)) + 1).astype(format.scale_dtype)
    zero = None if format.symmetric else RNG.integers(0, 3, scale.shape).astype(storage)
    if isinstance(qtype, numerics.Float):
        values = RNG.normal(size=blank.shape).astype(storage)
    else:
        signed = isinstance(qtype, numerics.Int) and qtype.signed
        values = (codes - states // 2 if signed else codes).astype(storage)
    if kept is not None:
        at_zero = np.array(zero_code(format)).astype(storage) if zero is None else zero
        values = np.where(format.granularity.block(kept), values, at_zero)
    overall = np.full((1,) * scale.ndim, 0.3, np.float32) if format.global_scale else None
    parts = jax.tree.map(jnp.asarray, (values, scale, zero, overall))
    return QArray(
        values=parts[0],
        scale=parts[1],
        zero=parts[2],
        global_scale=parts[3],
        format=format,
        dtype=jnp.float32,
    )


def side_bytes(q):
    sides = jax.tree.leaves(dataclasses.replace(q, values=None))
    return sum(-(-part.size * tree.bits_of(part.dtype) // 8) for part in sides)
