"""Labels against a brute-force model: every index written out, ties by closure."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.graph.dims._labels import Labels


def same(labels, a, b):
    return np.array_equal(labels.rows(a), labels.rows(b))


def test_merging_and_splitting_are_inverse():
    labels = Labels()
    parts = [labels.fresh(n) for n in (2, 3, 5)]
    for part, again in zip(parts, labels.split(labels.merge(parts), [2, 3, 5]), strict=True):
        assert same(labels, part, again)
    assert labels.conflicts == 0


def test_slices_of_one_index_are_not_tied_by_axes_of_size_one():
    labels = Labels()
    wide = labels.fresh(3)
    for k in range(3):
        labels.unify(wide[k : k + 1], labels.fresh(1))
        labels.unify(labels.fresh(1), wide[k : k + 1])
    assert len(np.unique(labels.rows(wide))) == 3 and labels.find(labels.fresh(1)) == 0


def test_a_late_split_shows_in_what_was_tied_before():
    labels = Labels()
    first, second = labels.fresh(12), labels.fresh(12)
    labels.unify(first, second)
    major, minor = labels.split(second, [3, 4])
    assert same(labels, first, labels.merge([major, minor]))


def test_splits_that_nest_refine_each_other():
    labels = Labels()
    axis = labels.fresh(24)
    coarse, fine = labels.split(axis, [6, 4]), labels.split(axis, [2, 3, 4])
    assert same(labels, coarse[0], labels.merge(fine[:2])) and same(labels, coarse[1], fine[2])
    assert labels.conflicts == 0


def test_splits_that_do_not_nest_are_frozen_with_a_reason():
    labels = Labels()
    first, second = labels.fresh(12), labels.fresh(12)
    labels.split(first, [3, 4])
    labels.split(second, [4, 3])
    labels.unify(first, second)
    frozen = {int(label) for axis, _ in labels.frozen for label in labels.rows(axis).reshape(-1)}
    assert labels.conflicts and set(labels.rows(first).reshape(-1).tolist()) <= frozen
    assert all("do not nest" in reason for _, reason in labels.frozen)


def test_sums_inside_products():
    """(H, 3, D): the parts q, k, v of each head, of which q and k are contracted."""
    labels = Labels()
    fused = labels.fresh(2 * 3 * 4)
    heads, rest = labels.split(fused, [2, 12])
    q, k, v = np.split(rest, 3)
    labels.unify(q, k)
    out = labels.fresh(8)
    labels.unify(out, labels.merge([heads, v]))
    rows = labels.rows(fused).reshape(2, 3, 4, 2)
    assert (rows[:, 0] == rows[:, 1]).all() and (rows[:, 1] != rows[:, 2]).any()
    assert (labels.rows(out).reshape(2, 4, 2) == rows[:, 2]).all()


def test_repeats_are_counted_not_removed():
    labels = Labels()
    axis = labels.fresh(3)
    copies, back = labels.split(np.tile(axis, 2), [2, 3])
    assert same(labels, axis, back)
    assert any(np.array_equal(frozen, copies) for frozen, _ in labels.frozen)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12), st.randoms())
def test_ties_are_the_closure_of_pairs(pairs, random):
    """Unifying vectors in any order gives the classes that unifying pairs one by one does."""
    labels, axis = Labels(), None
    axis = labels.fresh(12)
    if pairs:
        a, b = (axis[[p[k] for p in pairs]] for k in (0, 1))
        order = list(range(len(pairs)))
        random.shuffle(order)
        labels.unify(a[order], b[order])
    classes = [{k} for k in range(12)]
    for i, j in pairs:
        joined = classes[i] | classes[j]
        for k in joined:
            classes[k] = joined
    root = labels.find(axis)
    for i, j in itertools.combinations(range(12), 2):
        assert (root[i] == root[j]) == (j in classes[i])


@pytest.mark.parametrize("sizes", [(2, 6), (3, 4), (2, 2, 3)])
def test_an_index_of_a_product_goes_with_either_part(sizes):
    labels = Labels()
    axis = labels.fresh(12)
    parts = labels.split(axis, list(sizes))
    rows = labels.rows(axis)
    for k, part in enumerate(parts):
        with_first = (rows == labels.find(part[:1])).any(axis=1)
        index = np.unravel_index(np.arange(12), sizes)[k]
        np.testing.assert_array_equal(with_first, index == 0)
