"""Labels of indices: which indices of which axes are the same one.

Each index of each axis has a label. Two indices that must live and die together have labels in one
class (union-find). A label may stand for an ordered tuple of others: index `(h, d)` of an axis that
merges heads with their features. An index goes if any label of its tuple goes. Tuples are built by
merging axes and found by splitting them, so the whole is first-order unification, vectorised.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

Axis: TypeAlias = np.ndarray
"""The labels along one axis, (size,) int32."""

ONE = 0
"""The label of every axis of size 1: nothing can be removed from it."""
_DEEPEST = 16
"""The longest tuple that is followed; longer ones are cycles."""


class Labels:
    """A store of labels, and of what is known of them."""

    def __init__(self) -> None:
        self._count = 1
        self._parent = np.zeros(1024, np.int32)
        self._left = np.full(1024, -1, np.int32)
        self._right = np.full(1024, -1, np.int32)
        self.frozen: list[tuple[Axis, str]] = []
        """What may not be removed, and why, in the order in which that was found."""
        self.frozen_else: list[tuple[Axis, str]] = []
        """Reasons that are only given where there is no other."""
        self.conflicts = 0
        """How many times two structures did not fit; more passes may mend it."""

    def __len__(self) -> int:
        return self._count

    def copy(self) -> "Labels":
        """Make a store with the same labels, which can grow by itself."""
        other = copy.copy(self)
        other._parent, other._left = self._parent.copy(), self._left.copy()
        other._right = self._right.copy()
        other.frozen, other.frozen_else = list(self.frozen), list(self.frozen_else)
        return other

    def fresh(self, size: int, *, frozen: str | None = None) -> Axis:
        """Make labels that are known of nothing; `frozen` says why none may be removed."""
        axis = np.zeros(1, np.int32) if size == 1 else self._new(size)
        if frozen is not None:
            self.freeze(axis, frozen)
        return axis

    def _new(self, size: int) -> Axis:
        end = self._count + size
        if end > len(self._parent):
            room = max(end, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(room, np.int32)])
            self._left = np.concatenate([self._left, np.full(room, -1, np.int32)])
            self._right = np.concatenate([self._right, np.full(room, -1, np.int32)])
        new = np.arange(self._count, end, dtype=np.int32)
        self._parent[self._count : end] = new
        self._count = end
        return new

    def freeze(self, axis: Axis, reason: str, *, otherwise: bool = False) -> None:
        """Say that no index of an axis may be removed; `otherwise`: if nothing else says it."""
        if len(axis) > 1 or axis.any():
            (self.frozen_else if otherwise else self.frozen).append((axis, reason))

    def freeze_all(self, axes: Iterable[Axis], reason: str, *, otherwise: bool = False) -> None:
        """Say it of several axes."""
        for axis in axes:
            self.freeze(axis, reason, otherwise=otherwise)

    # --- classes --------------------------------------------------------------------------------

    def find(self, axis: Axis) -> Axis:
        """Give the representatives of labels."""
        root = self._parent[axis]
        above = self._parent[root]
        while not np.array_equal(root, above):
            root, above = above, self._parent[above]
        self._parent[axis] = root
        return root

    def rows(self, axis: Axis) -> np.ndarray:
        """Write labels as tuples of representatives that stand for themselves.

        Returns:
            (size, k), padded with -1 on the right.
        """
        matrix = self.find(axis)[:, None]
        column = 0
        while column < matrix.shape[1]:
            bound = (matrix[:, column] >= 0) & (self._left[matrix[:, column]] >= 0)
            if not bound.any():
                column += 1
                continue
            assert matrix.shape[1] < _DEEPEST, "a label that contains itself"
            pad = np.full((len(matrix), 1), -1, np.int32)
            wide = np.concatenate([matrix, pad], axis=1)
            wide[bound, column + 2 :] = matrix[bound, column + 1 :]
            wide[bound, column] = self.find(self._left[matrix[bound, column]])
            wide[bound, column + 1] = self.find(self._right[matrix[bound, column]])
            matrix = wide
        return matrix

    def members(self, axis: Axis) -> np.ndarray:
        """List the labels that an axis is made of, each as often as it occurs."""
        rows = self.rows(axis)
        return rows[rows >= 0]

    def unify(self, a: Axis, b: Axis) -> Axis:
        """Make two axes of one size the same, index by index; gives the first."""
        if a is b or (len(a) == 1 and (a[0] == ONE or b[0] == ONE)):
            return a
        assert len(a) == len(b), (len(a), len(b))
        todo = [(a, b)]
        while todo:
            self._unify(*todo.pop(), todo)
        return a

    def _unify(self, a: Axis, b: Axis, todo: list[tuple[Axis, Axis]]) -> None:
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            free_a, free_b = self._left[a] < 0, self._left[b] < 0
            both = free_a & free_b
            if both.any():
                low, high = np.minimum(a[both], b[both]), np.maximum(a[both], b[both])
                self._parent[high] = low
                continue
            one = free_a | free_b
            if one.any():
                free = np.where(free_a, a, b)[one]
                bound = np.where(free_a, b, a)[one]
                inside = (self.rows(bound) == free[:, None]).any(axis=1)
                if inside.any():
                    self._conflict(bound[inside])
                    self._conflict(free[inside])
                # One at a time for each label: what is left over meets it bound, next time.
                _, first = np.unique(free, return_index=True)
                first = first[~inside[first]]
                if self._cyclic(free[first], bound[first]):
                    first = first[:1]
                self._parent[free[first]] = bound[first]
                keep = np.ones(len(a), bool)
                keep[np.flatnonzero(one)[inside]] = False
                a, b = a[keep], b[keep]
                continue
            self._unify_tuples(a, b, todo)
            return

    def _cyclic(self, free: Axis, bound: Axis) -> bool:
        """Tell whether binding several labels at once would make one contain another's."""
        return bool(np.isin(self.rows(bound), free).any())

    def _conflict(self, axis: Axis) -> None:
        self.conflicts += 1
        self.freeze(axis, "its axis is split in two ways that do not nest")

    def _unify_tuples(self, a: Axis, b: Axis, todo: list[tuple[Axis, Axis]]) -> None:
        rows_a, rows_b = self.rows(a), self.rows(b)
        arity_a, arity_b = (rows_a >= 0).sum(axis=1), (rows_b >= 0).sum(axis=1)
        for ka, kb in {(int(x), int(y)) for x, y in zip(arity_a, arity_b, strict=True)}:
            mine = (arity_a == ka) & (arity_b == kb)
            one, other = rows_a[mine, :ka], rows_b[mine, :kb]
            segments = _align_columns(one, other)
            if segments is None:
                self._conflict(a[mine])
                self._conflict(b[mine])
                continue
            for (i0, i1), (j0, j1) in segments:
                todo.append((self.compose(one[:, i0:i1]), self.compose(other[:, j0:j1])))

    # --- tuples ---------------------------------------------------------------------------------

    def compose(self, rows: np.ndarray) -> Axis:
        """Make labels that stand for the rows of a matrix of labels, equal ones for equal rows."""
        if rows.shape[1] == 1:
            return rows[:, 0]
        unique, index = np.unique(rows, axis=0, return_inverse=True)
        made = unique[:, -1]
        for column in range(rows.shape[1] - 2, -1, -1):
            made = self._pair(unique[:, column], made)
        return made[index.reshape(-1)]

    def _pair(self, left: Axis, right: Axis) -> Axis:
        new = self._new(len(left))
        self._left[new], self._right[new] = left, right
        return new

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """Merge axes to one, row-major."""
        axes = [axis for axis in axes if len(axis) != 1]
        if not axes:
            return self.fresh(1)
        merged = axes[-1]
        for axis in reversed(axes[:-1]):
            merged = self._pair(np.repeat(axis, len(merged)), np.tile(merged, len(axis)))
        return merged

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Split one axis into several, row-major."""
        parts, rest = [], axis
        for k, size in enumerate(sizes[:-1]):
            part, rest = self._halve(rest, size, math.prod(sizes[k + 1 :]))
            parts.append(part)
        return [*parts, rest]

    def _halve(self, axis: Axis, n: int, m: int) -> tuple[Axis, Axis]:
        if n == 1 or m == 1:
            one = self.fresh(1)
            return (one, axis) if n == 1 else (axis, one)
        rows = self.rows(axis)
        grid = rows.reshape(n, m, -1)
        major, minor = self._new(n), self._new(m)
        if (grid == grid[:1]).all():  # a tile: one index of it may not go without the others
            self.freeze(major, "it counts copies")
            return major, axis.reshape(n, m)[0]
        if (grid == grid[:, :1]).all():
            self.freeze(minor, "it counts copies")
            return axis.reshape(n, m)[:, 0], minor
        arity = (rows >= 0).sum(axis=1)
        i, j = np.divmod(np.arange(n * m), m)
        for k in np.unique(arity):
            mine = arity == k
            self._cut(rows[mine, :k], major[i[mine]], minor[j[mine]], i[mine], j[mine])
        return major, minor

    def _cut(
        self, rows: np.ndarray, major: Axis, minor: Axis, i: np.ndarray, j: np.ndarray
    ) -> None:
        """Bind rows to pairs `(major, minor)`, where one place to cut all of them is found."""
        k = rows.shape[1]
        for cut in range(1, k):
            if _depends_on(rows[:, :cut], i) and _depends_on(rows[:, cut:], j):
                self.unify(major, self.compose(rows[:, :cut]))
                self.unify(minor, self.compose(rows[:, cut:]))
                return
        for cut in range(k):
            before, after = rows[:, :cut], rows[:, cut + 1 :]
            if _depends_on(before, i) and _depends_on(after, j):
                # The column itself is split: its label is a pair of a part of each.
                upper = major if not cut else self._new(int(i.max()) + 1)[i]
                lower = minor if cut == k - 1 else self._new(int(j.max()) + 1)[j]
                self.unify(rows[:, cut], self._pair(upper, lower))
                if cut:
                    self.unify(major, self.compose(np.concatenate([before, upper[:, None]], 1)))
                if cut < k - 1:
                    self.unify(minor, self.compose(np.concatenate([lower[:, None], after], 1)))
                return
        for axis in (*rows.T, major, minor):
            self._conflict(axis)


def _depends_on(rows: np.ndarray, index: np.ndarray) -> bool:
    """Tell whether rows are a function of an index."""
    if not rows.shape[1]:
        return True
    _, first, inverse = np.unique(index, return_index=True, return_inverse=True)
    return bool((rows == rows[first][inverse.reshape(-1)]).all())


def _partition(rows: np.ndarray) -> np.ndarray:
    """Number the classes of equal rows in the order in which they come."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[inverse.reshape(-1)]


def _align_columns(
    a: np.ndarray, b: np.ndarray
) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Find which columns of two descriptions of the same indices are the same.

    Returns:
        Pairs of ranges of columns, one of which is a single column; `None` if there are none.
    """
    ka, kb = a.shape[1], b.shape[1]
    segments: list[tuple[tuple[int, int], tuple[int, int]]] = []
    i = j = 0
    parts_a = [_partition(a[:, :k]) for k in range(1, ka)]
    parts_b = [_partition(b[:, :k]) for k in range(1, kb)]
    for x in range(1, ka):
        y = next((y for y in range(j + 1, kb) if np.array_equal(parts_a[x - 1], parts_b[y - 1])), 0)
        if y:
            segments.append(((i, x), (j, y)))
            i, j = x, y
    segments.append(((i, ka), (j, kb)))
    fits = all(i1 - i0 == 1 or j1 - j0 == 1 for (i0, i1), (j0, j1) in segments)
    return segments if fits else None
