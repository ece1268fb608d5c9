"""Round trips through the file: every kind of leaf, every container."""

import dataclasses
import os
import pathlib
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
from round_trips import BITMAP, KEPT, RNG, qarray, same, same_trees

from jaxcompress import export, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError

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
