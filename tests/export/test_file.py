"""Round trips through the file: every kind of leaf, every format, every container."""

import base64
import dataclasses
import os
import pathlib
import zlib
from typing import NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import export, numerics, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor, QArray

RNG = np.random.default_rng(0)
KEPT = np.random.default_rng(1).random((8, 6)) < 0.4
BITMAP = 6  # bytes for 48 entries


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


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


# --- Arrays -----------------------------------------------------------------------------------

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
DTYPES += ["int32", "int16", "int8", "uint32", "uint16", "uint8", "bool", "complex64"]
DTYPES += ["int4", "uint4", "int2", "uint2"]


def array_of(dtype, shape=(8, 6)):
    """Random entries of a dtype, as a NumPy array."""
    if dtype == "bool":
        return RNG.random(shape) < 0.5
    if jnp.issubdtype(jnp.dtype(dtype), jnp.integer):
        info = jnp.iinfo(dtype)
        return RNG.integers(int(info.min), int(info.max) + 1, shape).astype(jnp.dtype(dtype))
    return RNG.normal(size=shape).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_dtype(path, dtype):
    params = {
        "matrix": jnp.asarray(array_of(dtype)),
        "scalar": jnp.asarray(array_of(dtype, ())),
        "nothing": jnp.zeros((0, 3), dtype),
        "masked": jnp.asarray(np.where(KEPT, array_of(dtype), np.zeros((), jnp.dtype(dtype)))),
    }
    mask = {"matrix": None, "scalar": None, "nothing": None, "masked": jnp.asarray(KEPT)}
    info = export.save(path, params, mask=mask)
    loaded = export.load(path)
    same_trees(loaded.params, params)
    same_trees(loaded.mask, mask)
    width = 1 if dtype == "bool" else tree.bits_of(jnp.dtype(dtype))
    assert info.leaves["matrix"] == 48 * width // 8
    assert info.leaves["masked"] == BITMAP + -(-KEPT.sum() * width // 8)
    assert info.leaves["nothing"] == 0


def test_nan_infinity_and_minus_zero_keep_their_bits(path):
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    odd = np.append(odd, np.array([0x7FC12345], np.uint32).view(np.float32))
    export.save(path, {"odd": odd})
    same(export.load(path).params["odd"], jnp.asarray(odd))


def test_random_keys_and_python_numbers(path):
    params = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "raw": jax.random.PRNGKey(5),
        "step": 7,
        "rate": 0.1,
        "on": True,
    }
    export.save(path, params)
    same_trees(export.load(path).params, params)


def test_sixty_four_bits_are_never_narrowed(path):
    params = {
        "big": np.array([2**40 + 1]),
        "fine": np.array([1 + 2**-40]),
        "swapped": np.arange(3, dtype=">f4"),
    }
    export.save(path, params)
    loaded = export.load(path).params
    assert isinstance(loaded["big"], np.ndarray) and loaded["big"] == 2**40 + 1
    assert loaded["fine"].dtype == np.float64 and loaded["fine"] == 1 + 2**-40
    np.testing.assert_array_equal(loaded["swapped"], [0, 1, 2])
    with jax.enable_x64(True):
        assert isinstance(export.load(path).params["fine"], jax.Array)


# --- Formats ----------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", FORMATS)
def test_codes_take_the_bits_of_their_type(path, name):
    q = qarray(name)
    info = export.save(path, {"w": q})
    same_trees(export.load(path).params, {"w": q})
    assert info.leaves["w"] == FORMATS[name][1] + side_bytes(q)


@pytest.mark.parametrize("name", CAN_PRUNE)
def test_only_kept_codes_are_written(path, name):
    q = qarray(name, kept=KEPT)
    info = export.save(path, {"w": q}, mask={"w": KEPT})
    loaded = export.load(path)
    same_trees(loaded.params, {"w": q})
    np.testing.assert_array_equal(loaded.mask["w"], KEPT)
    dense = FORMATS[name][1]
    assert info.leaves["w"] <= BITMAP + side_bytes(q) + np.ceil(dense * KEPT.mean()) + 1


@pytest.mark.parametrize("name", ["binary", "basis"])
def test_a_type_without_zero_cannot_be_pruned(path, name):
    with pytest.raises(ArgumentError, match=r"`params`: expected .* exactly zero .*'w'"):
        export.save(path, {"w": qarray(name)}, mask={"w": KEPT})
    assert not path.exists()


def test_minus_zero_in_a_pruned_place_comes_back_as_zero(path):
    q = qarray("float8_e4m3fn", kept=KEPT)
    minus = jnp.asarray(np.where(KEPT, np.asarray(q.values), -np.asarray(q.values)))
    export.save(path, {"w": dataclasses.replace(q, values=minus)}, mask={"w": KEPT})
    same(export.load(path).params["w"], q)


def test_codes_that_their_scale_makes_zero_come_back_as_zero(path):
    q, alive = qarray("int8"), np.arange(6) % 2 == 0
    dead = dataclasses.replace(q, scale=jnp.asarray(np.where(alive, q.scale, 0)))
    export.save(path, {"w": dead}, mask={"w": np.tile(alive, (8, 1))})
    loaded = numerics.dequantize(export.load(path).params["w"])
    np.testing.assert_array_equal(loaded, numerics.dequantize(dead))


def test_stacked_qarrays(path):
    """What vmap over layers gives: one more leading axis on values and scale."""
    parts = [qarray("int4 grouped", kept=KEPT) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    mask = np.stack([KEPT] * 3)
    export.save(path, {"w": stacked}, mask={"w": mask})
    loaded = export.load(path)
    same(loaded.params["w"], stacked)
    np.testing.assert_array_equal(loaded.mask["w"], mask)


def test_what_quantize_gives_dequantizes_to_the_same(path):
    x = jnp.asarray(np.where(KEPT, RNG.normal(size=(8, 6)), 0), jnp.bfloat16)
    q = numerics.quantize(x, Format(numerics.int4, PerChannel()))
    export.save(path, {"w": q}, mask={"w": KEPT})
    loaded = export.load(path).params["w"]
    same(numerics.dequantize(loaded), numerics.dequantize(q))
    assert loaded.dtype == jnp.bfloat16 and loaded.shape == (8, 6)


ACTIVATIONS = {
    "static": (Format(numerics.uint8, symmetric=False), np.float32(0.1), np.float32(3)),
    "stacked": (Format(numerics.int8, range=numerics.Entropy()), np.full((3, 1), 0.2, "f4"), None),
    "dynamic": (Format(numerics.int8, numerics.PerToken()), None, None),
}


@pytest.mark.parametrize("name", ["int8 asymmetric", "nvfp4"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_form_of_activations_comes_back(path, name, kind):
    format, *parts = ACTIVATIONS[kind]
    scale, zero = (None if part is None else jnp.asarray(part) for part in parts)
    activation = numerics.Activation(format=format, scale=scale, zero=zero)
    q = dataclasses.replace(qarray(name, kept=KEPT), activation=activation)
    info = export.save(path, {"v": qarray(name), "w": q}, mask={"v": None, "w": KEPT})
    loaded = export.load(path)
    same(loaded.params["w"], q)
    np.testing.assert_array_equal(loaded.mask["w"], KEPT)
    assert loaded.params["w"].activation.format == format
    assert loaded.params["w"].activation.is_static == (scale is not None)
    assert loaded.params["v"].activation is None
    assert jax.tree.structure(loaded.params["w"]) == jax.tree.structure(q)
    assert sum(info.leaves.values()) == info.bytes


def test_stacked_global_scales_come_back(path):
    x = jnp.asarray(RNG.normal(size=(3, 16, 2)) * np.float32([[[1]], [[9]], [[99]]]), jnp.float32)
    stack = jax.vmap(lambda x: numerics.quantize(x, numerics.nvfp4))(x)
    export.save(path, {"w": stack})
    loaded = export.load(path).params["w"]
    same(loaded, stack)
    np.testing.assert_array_equal(numerics.dequantize(loaded), numerics.dequantize(stack))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_global_scale_that_does_not_fit_the_format_is_refused(path, name):
    other = None if name == "nvfp4" else jnp.ones((1, 1, 1))
    with pytest.raises(ArgumentError, match="global scale"):
        export.save(path, {"w": dataclasses.replace(qarray(name), global_scale=other)})


# Written before QArrays had global scales and activations: an int4 array with groups, zero points
# and a mask, a float8 one with bfloat16 scales, and numbers.
OLD_FILE = """
c-oCq&2H2%5MGHFv3x2hmE!zux~sO7!y+Uqaez}2t(;`ircL6l?WNsTK|LWZh}Yl=cm@s?2aZ%c1UI+<<D}azluB4hJb&NJml^
xxy+OCm=yY0x<~i4VI;EpCnwNW^G#ycJhEQw-zMuP?g`RI`A$Z}i@NLHp_%P?;&>u3-^+LzB9RQZ)8wGRO21BInrqrT^kTo~C4
){qX>X`(k2t!9EnwQY%QZx#^RjG9a>(JySZ^lH5<Mo;!2stJ-SBGju7}+F;Fw<j_i5wIu%BmviLK{(vn&^EXl{hA8i6Jggnxkt
(d@=*s#aSff3Wz%<&Ad+0xJlMbDzZ*aL5ln20Z|#R0I6vSfSk@^%40f;VtN!)%eErN@~j{+J2QJsi%M|qI_PCaO>d%^6@^_a>s
{B8M#=g(O#VlX$W4;=x@D#-5mK0R8X{0W(u*1N;*;je*6`YxVp=xZ>oQ^s6k5EtMP*O&W?pew>O~*_4CG@e=CfW?<tbdpszr?l
L6(MJ!7Bx5L-^iR$(>Z~@)IMsxU9RmP0TO-#jg9!a0*`S7R@Tn@J^b~p;1Ei_3mb3c$>LR^BV$75sP$nSrAjCoM3a!ae^FstL5
Cxdagj4S+}&cmb2*YfJuRl391%V``l;|^An497ey3>0yCt@wgNjr@Uqk@`q2dS75Hs*fN-aSmqx#Vz6e)<!{8rCJce$Vv@Pk^U
~s<u>EdF`yuJK%%e=ScWsF(p+xU5SIsQ;z;`8PBJ$?N(e{;3%e1G?O?d`9hKfVo)7O(z$`wf_kdY=
"""


def test_old_files_load(path):
    path.write_bytes(zlib.decompress(base64.b85decode(OLD_FILE.replace("\n", ""))))
    loaded = export.load(path)
    kept = np.arange(48).reshape(8, 6) % 3 > 0
    x = np.where(kept, np.arange(48).reshape(8, 6) % 7 - 3, 0).astype(np.float32)
    a = numerics.quantize(jnp.asarray(x), Format(numerics.int4, PerGroup(4), symmetric=False))
    same(loaded.params["a"], a)
    assert loaded.params["b"].format == Format(numerics.float8_e4m3fn, scale_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(loaded.mask["a"], kept)
    np.testing.assert_array_equal(loaded.params["c"], [0, 1, 2])
    content = path.read_bytes()  # and what they could say is still said in the same bytes
    export.save(path, loaded.params, mask=loaded.mask)
    assert path.read_bytes() == content


@export.allow
@dataclasses.dataclass(frozen=True)
class PerHalf(PerTensor):
    """A granularity of a user's own."""

    note: tuple[str, int] = ("x", 1)


def test_a_class_of_ones_own_must_be_allowed(path):
    mine = dataclasses.replace(qarray("int8"), format=Format(numerics.int8, PerHalf(("y", 2))))
    export.save(path, {"w": mine})
    assert export.load(path).params["w"].format == mine.format

    @dataclasses.dataclass(frozen=True)
    class Secret(PerTensor):
        pass

    hidden = dataclasses.replace(mine, format=Format(numerics.int8, Secret()))
    with pytest.raises(ArgumentTypeError, match=r"Secret.*export\.allow"):
        export.save(path, {"w": hidden})
    with pytest.raises(ArgumentTypeError, match="still free"):
        export.allow(type("PerTensor", (Secret,), {}))


# --- Containers -------------------------------------------------------------------------------


def test_containers_come_back_as_they_were(path):
    one = lambda x: jnp.full(2, x, jnp.float32)
    params = {
        "list": [one(1), None, (one(2), [one(3)])],
        "empty": {"dict": {}, "list": [], "tuple": (), "none": None},
        "numbered": {0: one(4), 10: one(5), 2: {"x": one(6)}},
        "a/b": {"ü": one(7)},
        'quoted "key"': one(8),
    }
    export.save(path, params)
    loaded = export.load(path).params
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    same_trees(loaded, params)
    assert isinstance(loaded["list"][2], tuple) and loaded["numbered"].keys() == {0, 2, 10}


@pytest.mark.parametrize("params", [{}, None, [], jnp.ones(3), 2.0], ids=str)
def test_empty_trees_and_lone_leaves(path, params):
    export.save(path, params)
    loaded = export.load(path).params
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    same_trees(loaded, params)


class Pair(NamedTuple):
    left: jax.Array
    right: dict


class Module(eqx.Module):
    weight: jax.Array
    inner: dict
    name: str = eqx.field(static=True)


def nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs)])
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)))


LIKE = {
    "frozen": lambda: flax.core.freeze({"b": {"x": jnp.ones(2)}, "a": jnp.zeros(3)}),
    "namedtuple": lambda: Pair(jnp.ones(2), {"z": jnp.zeros(1), "y": jnp.ones(1)}),
    "equinox": lambda: Module(jnp.ones((2, 2)), {"b": jnp.zeros(2), "a": None}, "static"),
    "nnx": nnx_state,
}


@pytest.mark.parametrize("make", LIKE.values(), ids=LIKE.keys())
def test_leaves_are_put_back_into_any_container(path, make):
    params = make()
    mask = tree.map_with_path(lambda _, x: jnp.asarray(x) != 0, params)
    info = export.save(path, params, mask=mask)
    blank = jax.tree.map(jnp.zeros_like, params)
    loaded = export.load(path, like=blank)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    assert jax.tree.structure(loaded.mask) == jax.tree.structure(mask)
    same_trees(loaded.params, params)
    same_trees(loaded.mask, mask)
    # Without `like`: the same leaves, by the same paths, in dictionaries and lists.
    plain = export.load(path).params
    assert sorted(tree.paths(plain)) == sorted(tree.paths(params))
    assert set(info.leaves) == {*tree.paths(params), "(header)"}


def test_like_may_be_shapes_and_hold_qarrays(path):
    params = {"w": qarray("int4 grouped", kept=KEPT), "b": jnp.ones(3)}
    export.save(path, params, mask={"w": KEPT, "b": None})
    like = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((3,), "f4")}
    loaded = export.load(path, like=like)
    same_trees(loaded.params, params)
    assert loaded.mask["b"] is None


def test_a_file_of_another_model_is_named(path):
    export.save(path, {"w": jnp.ones((2, 3)), "old": jnp.ones(1)})
    like = {"w": jnp.ones((3, 2)), "new": jnp.ones(1)}
    with pytest.raises(StructureError) as error:
        export.load(path, like=like)
    for part in ("not in the file: new", "only in the file: old", "'w' is [2, 3] in the file"):
        assert part in str(error.value)


# --- Files ------------------------------------------------------------------------------------


def small_model():
    params = {"w": qarray("int4 grouped", kept=KEPT), "b": jnp.arange(5.0), "k": jnp.ones(3, "i4")}
    return params, {"w": KEPT, "b": None, "k": None}


def test_sizes_are_the_files(path):
    params, mask = small_model()
    info = export.save(path, params, mask=mask, metadata={"accuracy": 0.9, "of": ["a", None]})
    assert info.bytes == os.path.getsize(path) == sum(info.leaves.values())
    loaded = export.load(path)
    assert loaded.info == info
    assert loaded.metadata == {"accuracy": 0.9, "of": ["a", None]}
    assert export.save(path, params).bytes and export.load(path).mask is None


def test_the_header_stays_small(path):
    """Twenty leaves of a 40,000-parameter network."""
    params = {
        f"Block_{i}": {
            "Conv_0": {"kernel": jnp.zeros((3, 3, 16, 16))},
            "BatchNorm_0": {"scale": jnp.zeros(16), "bias": jnp.zeros(16), "mean": jnp.zeros(16)},
        }
        for i in range(5)
    }
    assert export.save(path, params).leaves["(header)"] < 1500


def test_the_same_model_is_the_same_file(path, tmp_path):
    params, mask = small_model()
    other = tmp_path / "folder" / "other.safetensors"
    first, second = export.save(path, params, mask=mask), export.save(other, params, mask=mask)
    assert first.digest == second.digest and path.read_bytes() == other.read_bytes()
    third = export.save(other, params | {"b": params["b"] + 1}, mask=mask)
    assert third.digest != first.digest


def test_the_safetensors_package_reads_it(path):
    params, mask = small_model()
    export.save(path, params, mask=mask)
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"bits", "float32", "int32"}
        assert file.metadata()["format"] == "jaxcompress 1"
        np.testing.assert_array_equal(file.get_tensor("int32"), [1, 1, 1])
        assert file.get_tensor("float32")[:5].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "complex64"])
def test_every_pool_is_valid_safetensors(path, dtype):
    export.save(path, {"x": jnp.asarray(array_of(dtype)), "y": jnp.ones(3)})
    entries = dict(safetensors.deserialize(path.read_bytes()))
    assert set(entries) == {dtype, "float32"} and entries[dtype]["shape"] == [48]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_params_are_gathered(path, axis_type):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    q, kept = qarray("int4 grouped", kept=np.ones((8, 6), bool)), np.ones((8, 6), bool)
    w = jnp.asarray(array_of("float32"))
    placed = jax.device_put(w, NamedSharding(mesh, P("a", "b")))
    q_placed = dataclasses.replace(
        q, values=jax.device_put(q.values, NamedSharding(mesh, P(None, "a", "b")))
    )
    plain = export.save(path, {"w": w, "q": q}, mask={"w": None, "q": kept})
    sharded = export.save(path, {"w": placed, "q": q_placed}, mask={"w": None, "q": kept})
    assert sharded.digest == plain.digest


def test_a_failure_leaves_the_old_file(path, monkeypatch):
    export.save(path, {"w": jnp.ones(3)})
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        export.save(path, {"w": jnp.zeros(3)})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_paths_may_be_text_and_folders_are_made(tmp_path):
    info = export.save(str(tmp_path / "a" / "b.safetensors"), {"w": jnp.ones(3)})
    assert isinstance(info.path, pathlib.Path) and export.load(str(info.path)).info == info


# --- Bad input --------------------------------------------------------------------------------


def test_pruned_entries_must_be_zero(path):
    w = np.where(KEPT, 1.0, 0.0).astype(np.float32)
    w[tuple(np.argwhere(~KEPT)[0])] = np.nan
    with pytest.raises(ArgumentError, match=r"'mlp/w' with 1 entries that are not 0"):
        export.save(path, {"mlp": {"w": w}}, mask={"mlp": {"w": KEPT}})
    with pytest.raises(ArgumentError, match=r"sparsity.apply\(params, mask\)"):
        export.save(path, {"w": qarray("int8")}, mask={"w": KEPT})


@pytest.mark.parametrize(
    "mask",
    [{"w": KEPT.T}, {"w": KEPT.astype(np.float32)}, {"v": KEPT}, {}, [KEPT]],
    ids=["shape", "dtype", "path", "empty", "container"],
)
def test_a_mask_of_another_model_is_refused(path, mask):
    with pytest.raises(StructureError, match="`mask`"):
        export.save(path, {"w": np.zeros((8, 6), np.float32)}, mask=mask)


def test_a_mask_on_a_number_is_refused(path):
    with pytest.raises(StructureError, match="`mask`.*'step', a leaf of type int"):
        export.save(path, {"step": 3}, mask={"step": np.array(True)})


@pytest.mark.parametrize("leaf", ["text", object(), np.array(["text"]), jax.nn.relu], ids=range(4))
def test_what_is_no_array_is_refused(path, leaf):
    with pytest.raises(ArgumentTypeError, match=r"`params`.*'act'"):
        export.save(path, {"act": leaf})


def test_keys_must_be_text_or_integers(path):
    with pytest.raises(ArgumentTypeError, match=r"the key 1\.5 in the mapping at 'a'"):
        export.save(path, {"a": {1.5: jnp.ones(1)}})


@pytest.mark.parametrize("metadata", [{"x": jnp.ones(1)}, {"x": (1, 2)}, {1: "x"}], ids=str)
def test_metadata_must_be_json(path, metadata):
    with pytest.raises(ArgumentTypeError, match="`metadata`"):
        export.save(path, {}, metadata=metadata)


def test_codes_beyond_the_type_are_refused(path):
    q = qarray("ternary")
    with pytest.raises(ArgumentError, match="a ternary with the code 3"):
        export.save(path, {"w": dataclasses.replace(q, values=jnp.full_like(q.values, 3))})


def test_two_leaves_of_one_path_are_refused(path):
    with pytest.raises(ArgumentError, match="two leaves at 'a/b'"):
        export.save(path, {"a/b": np.ones(2), "a": {"b": np.zeros(2)}})
    assert not path.exists()
