import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import train
from jaxcompress.errors import ArgumentError, FileError, StructureError
from jaxcompress.train._store import Store

KEY = jax.random.key(3)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(problem, tmp_path):
    state = train.init(problem.params, optax.adam(0.1), key=KEY)
    with Store(tmp_path) as store:
        store.save(5, {"state": state}, {"note": [0.1, float("nan"), None]})
    return tmp_path, state


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    arrays = {
        "bf16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7,
        "f8": jnp.arange(4).astype(jnp.float8_e4m3fn),
        "int4": jnp.arange(-4, 4).astype(jnp.int4),
        "mask": jnp.array([True, False, True]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(0.1),
        "odd": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-42], jnp.float32),
        "keys": (jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 2)),
        "none": None,
    }
    with Store(tmp_path) as store:
        store.save(1, {"it": arrays}, {})
    with Store(tmp_path) as store:
        # The restored empty array is that of `like`: it has nothing to restore.
        found = store.read(1, "it", jax.tree.map(lambda x: x.copy(), arrays))
    equal(found, arrays)
    assert np.signbit(np.asarray(found["odd"])[2])
    assert str(jax.random.key_impl(found["keys"][1])) == "rbg"


def test_the_book_comes_back(saved):
    folder, _ = saved
    with Store(folder) as store:
        note = store.book(5)["note"]
    assert note[0] == 0.1 and np.isnan(note[1]) and note[2] is None


def test_restores_onto_other_devices(saved, problem):
    folder, state = saved
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    rules = {"first/kernel": P(None, "model")}
    fresh = jax.tree.map(np.zeros_like, problem.params)
    like = train.init(fresh, optax.adam(0.1), key=jax.random.key(9), mesh=mesh, sharding=rules)
    found = train.restore(folder, like=like)
    equal(found, state)
    assert found.params["first"]["kernel"].sharding.spec == P(None, "model")
    assert found.opt_state[0].nu["first"]["kernel"].sharding.spec == P(None, "model")
    assert isinstance(found.key.sharding, NamedSharding)
    assert len(found.key.sharding.device_set) == 8


def test_and_back_onto_one(problem, tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    tx = optax.adam(0.1)
    sharded = train.init(
        problem.params, tx, key=KEY, mesh=mesh, sharding={"first/kernel": P(None, "data")}
    )
    with Store(tmp_path) as store:
        store.save(1, {"state": sharded}, {})
    found = train.restore(tmp_path, like=train.init(problem.params, tx, key=KEY))
    equal(found, sharded)
    assert len(found.params["first"]["kernel"].devices()) == 1


def another_shape(params):
    return {**params, "second": {**params["second"], "bias": np.zeros(3, np.float32)}}


def another_dtype(params):
    return jax.tree.map(lambda x: x.astype(np.float16), params)


def another_name(params):
    return {"zeroth": params["first"], "second": params["second"]}


@pytest.mark.parametrize(
    ("change", "tx", "named"),
    [
        (another_shape, optax.adam(0.1), r"'params/second/bias' is float32\[2\] instead of.*\[3\]"),
        (another_dtype, optax.adam(0.1), r"'params/first/bias' is float32\[8\] instead of float16"),
        (another_name, optax.adam(0.1), "'params/zeroth/bias' is missing"),
        (another_name, optax.adam(0.1), "and 6 more"),
        (lambda p: p, optax.sgd(0.1), "'opt_state/0/mu/first/bias' is not of this model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, problem, change, tx, named):
    folder, _ = saved
    like = train.init(change(problem.params), tx, key=KEY)
    with pytest.raises(StructureError, match=named):
        train.restore(folder, like=like)


def test_a_key_of_another_kind_is_refused(saved, problem):
    like = train.init(problem.params, optax.adam(0.1), key=jax.random.key(0, impl="rbg"))
    with pytest.raises(StructureError, match="'key' is"):
        train.restore(saved[0], like=like)


def test_missing_checkpoints_are_named(saved, tmp_path):
    folder, state = saved
    with pytest.raises(FileError, match=r"steps \[5\]"):
        train.restore(folder, like=state, step=4)
    with pytest.raises(FileError, match="a checkpoint"):
        train.restore(tmp_path / "nowhere", like=state)
    assert not (tmp_path / "nowhere").exists()


def test_only_the_latest_are_kept(tmp_path):
    with Store(tmp_path, keep=2) as store:
        for step in (1, 2, 3, 10):
            store.save(step, {"it": {"x": jnp.full(2, step)}}, {})
    with Store(tmp_path) as store:
        assert store.steps() == [3, 10]


def test_what_was_saved_may_be_donated_at_once(tmp_path):
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jnp.zeros(1 << 20)
    with Store(tmp_path) as store:
        store.save(1, {"it": x}, {})
        for _ in range(20):
            x = add(x)
    with Store(tmp_path) as store:
        assert not np.any(store.read(1, "it", x))


def test_paths_that_read_the_same_are_refused(tmp_path):
    clash = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    with Store(tmp_path) as store, pytest.raises(ArgumentError, match="read the same"):
        store.save(1, {"it": clash}, {})


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"keep": 0}])
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(ArgumentError, match=next(iter(kwargs))):
        train.Checkpoints(directory="x", **kwargs)
