import numpy as np
import pytest

from jaxcompress import train
from jaxcompress.errors import ArgumentError
from jaxcompress.train._data import prefetch_batches

ARRAYS = {"x": np.arange(20).reshape(10, 2), "y": (np.arange(10), np.arange(10) * 10)}


def test_each_epoch_is_a_permutation_and_rows_stay_together():
    data = train.Batches(ARRAYS, batch_size=3, seed=1, drop_last=False)
    assert data.steps_per_epoch == 4
    epochs = [[data[i] for i in range(4 * e, 4 * e + 4)] for e in range(3)]
    orders = [np.concatenate([b["y"][0] for b in batches]) for batches in epochs]
    for order in orders:
        assert sorted(order) == list(range(10))
    assert len({tuple(order) for order in orders}) == 3
    for batch in epochs[1]:
        np.testing.assert_array_equal(batch["x"][:, 0], 2 * batch["y"][0])
        np.testing.assert_array_equal(batch["y"][1], 10 * batch["y"][0])


def test_a_batch_is_a_function_of_seed_and_index():
    a, b = (train.Batches(ARRAYS, batch_size=4, seed=7) for _ in range(2))
    other = train.Batches(ARRAYS, batch_size=4, seed=8)
    backwards = [b[i]["x"] for i in reversed(range(6))][::-1]
    for i in range(6):
        np.testing.assert_array_equal(a[i]["x"], backwards[i])
    assert any(not np.array_equal(a[i]["x"], other[i]["x"]) for i in range(6))


def test_drop_last_leaves_out_the_rest():
    data = train.Batches(ARRAYS, batch_size=4)
    assert data.steps_per_epoch == 2
    assert all(len(batch["x"]) == 4 for batch in data)
    assert len(list(data)) == 2


@pytest.mark.parametrize(
    ("arrays", "batch_size", "match"),
    [
        ({"x": np.zeros(3), "y": np.zeros(4)}, 2, "leading sizes"),
        ({"x": np.zeros(())}, 1, "leading sizes"),
        ({}, 1, "leading sizes"),
        ({"x": np.zeros(3)}, 4, "batch_size"),
        ({"x": np.zeros(3)}, 0, "batch_size"),
        ({"x": np.zeros((0, 2))}, 1, "batch_size"),
    ],
)
def test_bad_data_is_refused(arrays, batch_size, match):
    with pytest.raises(ArgumentError, match=match):
        train.Batches(arrays, batch_size=batch_size)


def test_a_negative_step_is_refused():
    with pytest.raises(ArgumentError, match="`i`"):
        train.Batches(ARRAYS, batch_size=2)[-1]


@pytest.mark.parametrize("depth", [0, 2, 50])
def test_prefetching_keeps_the_order_and_runs_ahead(depth):
    placed = []
    data = train.Batches(np.arange(12), batch_size=2, shuffle=False)
    stream = prefetch_batches(data, lambda x: placed.append(x) or x, range(3, 9), depth=depth)
    first, _ = next(stream)
    assert first == 3
    assert len(placed) == min(depth + 1, 6)
    rest = list(stream)
    assert [i for i, _ in rest] == [4, 5, 6, 7, 8]
    np.testing.assert_array_equal(rest[-1][1], data[8])
