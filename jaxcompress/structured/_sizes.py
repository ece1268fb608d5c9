"""What a function takes when so many units of each group are kept: counted from the labels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress import graph, tree
from jaxcompress.budget import Budget, Bytes, Flops, Params
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.sites import costliest
from jaxcompress.structured._groups import Groups

_Kinds = tuple[tuple[int, tuple[str, ...]], ...]
"""An axis as `(indices, groups that they belong to)` parts."""


class Sizes:
    """Counts params, bytes and FLOPs from numbers of units, without shrinking anything."""

    def __init__(self, groups: Groups):
        assert groups.dims is not None, "groups come from `structured.groups`"
        self._dims, self._groups = groups.dims, groups
        self._group_of = self._number_groups()
        self._known: dict[int, tuple[np.ndarray, _Kinds]] = {}
        self._leaves = [
            (tuple(self._kinds(axis) for axis in axes), tree.bits_of(groups.leaves[path].dtype))
            for path, axes in groups.dims.leaves.items()
        ]
        self._products = [
            (product, [self._kinds(axis) for axis in product.axes])
            for product in groups.dims.products
        ]

    def _number_groups(self) -> np.ndarray:
        """Number the group of each label; 0 for none."""
        numbers = np.zeros(len(self._dims.labels), np.int32)
        self._names = ["", *self._groups]
        for number, group in enumerate(self._groups.values(), start=1):
            assert group.labels is not None, "groups come from `structured.groups`"
            numbers[group.labels] = number
        return numbers

    def _kinds(self, axis: np.ndarray) -> _Kinds:
        if id(axis) not in self._known:
            rows = self._dims.labels.rows(axis)
            numbers = np.where(rows >= 0, self._group_of[rows], 0)
            kinds, counts = np.unique(np.sort(numbers, axis=1), axis=0, return_counts=True)
            named = tuple(
                (int(count), tuple(self._names[k] for k in kind if k))
                for kind, count in zip(kinds, counts, strict=True)
            )
            self._known[id(axis)] = axis, named
        return self._known[id(axis)][1]

    def _count_left(self, kinds: _Kinds, counts: Mapping[str, int]) -> float:
        total = 0.0
        for n, names in kinds:
            for name in names:
                n = n * counts.get(name, self._groups[name].size) / self._groups[name].size
            total += n
        return total

    def params(self, counts: Mapping[str, int]) -> float:
        """Count entries of params; `counts` has the units kept of each group."""
        return sum(self._entries(axes, counts) for axes, _ in self._leaves)

    def bytes(self, counts: Mapping[str, int]) -> float:
        """Count bytes of params."""
        return sum(self._entries(axes, counts) * bits / 8 for axes, bits in self._leaves)

    def _entries(self, axes: Sequence[_Kinds], counts: Mapping[str, int]) -> float:
        return math.prod(self._count_left(kinds, counts) for kinds in axes)

    def flops(self, counts: Mapping[str, int]) -> float:
        """Count operations of contractions; of branches the costliest."""
        return costliest(
            [
                (product.branch, product.flops * math.prod(
                    self._count_left(kinds, counts) / max(len(axis), 1)
                    for kinds, axis in zip(axes, product.axes, strict=True)
                ))
                for product, axes in self._products
            ]
        )  # fmt: skip


def measure_call(
    fn: Callable[..., Any], params: tree.Params, inputs: Any, kwargs: Any, budget: Budget
) -> float:
    """Measure what a call takes, in the quantity of a budget; shapes are enough."""
    if isinstance(budget, Params):
        return tree.count(params)
    if isinstance(budget, Bytes):
        return tree.nbytes(params)
    traced = graph.capture(fn, params, *inputs, **kwargs)
    if isinstance(budget, Flops):
        return graph.trace(traced).flops
    seconds = graph.cost(traced, target=budget.target).seconds
    if seconds is None:
        raise ArgumentError(
            "budget",
            got=f"Seconds on {budget.target!r}, whose compiler gives no estimate here",
            expected="a target with published figures, such as 'tpu-v5e' or 'h200'",
            fix="Use Params, Flops or Bytes, or describe the machine by a `graph.Target`.",
        )
    return seconds
