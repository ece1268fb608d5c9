"""`ptq` over a mesh: the codes that one device chooses, and leaves that stay where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import quantize, tree
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerToken, QArray, int4, int8
from jaxcompress.quantize import GPTQ, Policy, Rule

TOKEN = Format(int8, PerToken())
INT8 = Policy((Rule(weights=Format(int8, PerChannel()), activations=TOKEN),))
STATIC = Policy((Rule(weights=Format(int8, PerChannel()), activations=Format(int8), static=True),))
GROUPS = Policy((Rule(weights=Format(int4, PerGroup(4))),))
SOLVED = Policy((Rule(weights=Format(int4, PerGroup(4)), method=GPTQ(block=8)),))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"up": draw(8, 16), "heads": draw(16, 4, 4, seed=1), "down": draw(16, 8, seed=2)}
SPECS = {"up": (None, "model"), "heads": (None, "model"), "down": ("model",)}
X = draw(8, 8, seed=3)


def network(out_sharding=None):
    """Column-parallel up and heads (dim, heads, hd), row-parallel down."""

    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        # The contraction of a split axis has to say where its result lives.
        rows = None if out_sharding is None else out_sharding("data", "model", None)
        h = jnp.einsum("bd,dhk->bhk", h, p["heads"], out_sharding=rows)
        h = jnp.tanh(h[:, :, 0])
        h = jnp.concatenate([h, h, h, h], -1)
        rows = None if out_sharding is None else out_sharding("data", None)
        return jnp.dot(h, p["down"], out_sharding=rows)

    return fn


@functools.cache
def on_one_device(policy):
    return quantize.ptq(network(), PARAMS, [X], policy)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "policy", [INT8, STATIC, GROUPS, SOLVED], ids=["int8", "static", "groups", "gptq"]
)
def test_shards_get_the_codes_of_one_device(kind, policy):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {path: put(leaf, *SPECS[path]) for path, leaf in PARAMS.items()}
    explicit = kind == AxisType.Explicit
    fn = network((lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))) if explicit else None)
    with jax.set_mesh(mesh):
        got = quantize.ptq(fn, params, [put(X, "data")], policy)
    one = on_one_device(policy)
    for path, want in tree.items(one.params):
        mine = got.params[path]
        assert isinstance(want, QArray) and isinstance(mine, QArray)
        np.testing.assert_array_equal(mine.values, want.values)
        np.testing.assert_allclose(mine.scale, want.scale, rtol=1e-6)
        shard = mine.values.sharding.shard_shape(mine.values.shape)
        axis = SPECS[path].index("model")
        axis += isinstance(mine.format.granularity, PerGroup) and axis > 0  # groups take two axes
        assert shard[axis] == mine.values.shape[axis] // 4
        row, alone = got.report[path], one.report[path]
        assert row.weight_sqnr == pytest.approx(alone.weight_sqnr, abs=1e-3)
        assert row.output_sqnr == pytest.approx(alone.output_sqnr, abs=0.05)
        assert [use.kernel for use in row.kernels] == [use.kernel for use in alone.kernels]


def test_slices_of_a_stack_over_explicit_axes():
    """GPTQ meets the layers of a scan one by one, and puts each back where it was."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def layers(out_sharding):
        layer = lambda h, w: (jnp.tanh(jnp.dot(h, w, out_sharding=out_sharding)), None)
        return lambda p, x: jax.lax.scan(layer, x, p["layers"])[0]

    params = {"layers": draw(2, 8, 8)}
    spread = {"layers": put(params["layers"], None, None, "model")}
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    with jax.set_mesh(mesh):
        got = quantize.ptq(layers(rows), spread, [put(X, "data")], SOLVED).params["layers"]
    want = quantize.ptq(layers(None), params, [X], SOLVED).params["layers"]
    np.testing.assert_array_equal(got.values, want.values)
    assert got.values.sharding.shard_shape(got.values.shape)[-1] == 2
