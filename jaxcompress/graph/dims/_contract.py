"""How labels go through contractions, convolutions, lookups and scatters."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.dims._kept import Kept
from jaxcompress.graph.dims._labels import Axis
from jaxcompress.graph.dims._rule import Axes, Step, register_dims
from jaxcompress.graph.program import _compat


@register_dims("dot_general")
class _Dot:
    def follow(self, step: Step) -> list[Axes]:
        (lhs, rhs), (lhs_batch, rhs_batch) = step.params["dimension_numbers"]
        x, w = step.operands
        for i, j in (*zip(lhs, rhs, strict=True), *zip(lhs_batch, rhs_batch, strict=True)):
            step.labels.unify(x[i], w[j])
        left = [a for k, a in enumerate(x) if k not in {*lhs, *lhs_batch}]
        right = [a for k, a in enumerate(w) if k not in {*rhs, *rhs_batch}]
        return [(*(x[k] for k in lhs_batch), *left, *right)]


@register_dims("ragged_dot_general")
class _RaggedDot:
    """Tokens (m, k), sorted by group, times (g, k, n)."""

    def follow(self, step: Step) -> list[Axes]:
        numbers = step.params["ragged_dot_dimension_numbers"]
        (lhs, rhs), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
        x, w = step.operands[:2]
        step.labels.freeze_all(step.operands[2], "its entries are sizes of groups")
        for k in numbers.lhs_ragged_dimensions:
            step.labels.freeze(x[k], "it is divided into groups by values")
        for k in numbers.rhs_group_dimensions:
            step.labels.freeze(w[k], "its entries are groups whose sizes are values")
        ragged = set(numbers.lhs_ragged_dimensions)
        for i, j in (*zip(lhs, rhs, strict=True), *zip(lhs_batch, rhs_batch, strict=True)):
            if len(x[i]) == len(w[j]):
                step.labels.unify(x[i], w[j])
        left = [a for k, a in enumerate(x) if k not in {*lhs, *lhs_batch}]
        gone = {*rhs, *rhs_batch, *numbers.rhs_group_dimensions}
        right = [a for k, a in enumerate(w) if k not in gone]
        result = [*(x[k] for k in lhs_batch), *left, *right]
        if ragged & set(lhs):  # one result per group
            sizes = "its entries are groups whose sizes are values"
            groups = step.labels.fresh(step.shape()[0], frozen=sizes)
            result = [groups, *result]
        return [tuple(result)]


@register_dims("conv_general_dilated")
class _Conv:
    def follow(self, step: Step) -> list[Axes]:
        params, labels, (x, w) = step.params, step.labels, step.operands
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        result: list[Axis] = list(step.fresh()[0])
        if params["batch_group_count"] > 1:
            labels.freeze_all(
                (x[lhs[0]], x[lhs[1]], w[rhs[0]], result[out[1]]),
                "a convolution divides the batch into groups",
            )
            labels.unify(x[lhs[1]], w[rhs[1]])
        else:
            # Channels are (group, channel of the group), in and out: depthwise is one of each.
            major, minor = labels.split(x[lhs[1]], [groups, len(x[lhs[1]]) // groups])
            labels.unify(minor, w[rhs[1]])
            outer, _ = labels.split(w[rhs[0]], [groups, len(w[rhs[0]]) // groups])
            labels.unify(major, outer)
            result[out[0]], result[out[1]] = x[lhs[0]], w[rhs[0]]
        for k, (i, j, o) in enumerate(zip(lhs[2:], rhs[2:], out[2:], strict=True)):
            self._space(step, k, x[i], w[j], result, o)
        return [tuple(result)]

    def _space(self, step: Step, k: int, x: Axis, w: Axis, result: list[Axis], o: int) -> None:
        """Follow one axis of space: one that a window of 1 visits in order is the same."""
        params = step.params
        steps = (params["window_strides"][k], params["lhs_dilation"][k])
        if len(w) == 1 and steps == (1, 1) and tuple(params["padding"][k]) == (0, 0):
            result[o] = x
            return
        step.labels.freeze(x, "a convolution slides over it")
        step.labels.freeze(w, "it is the window of a convolution")
        step.labels.freeze(result[o], "it counts positions of a convolution")

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        x, w = operands
        numbers = eqn.params["dimension_numbers"]
        count = eqn.params["feature_group_count"]
        if eqn.params["batch_group_count"] == 1:
            count = x.shape[numbers.lhs_spec[1]] // w.shape[numbers.rhs_spec[1]]
        return _compat.bind(eqn, operands, {**eqn.params, "feature_group_count": count})


@register_dims("gather")
class _Gather:
    def follow(self, step: Step) -> list[Axes]:
        numbers, labels = step.params["dimension_numbers"], step.labels
        operand, indices = step.operands[:2]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        result = step.fresh()[0]
        shape = list(result)
        labels.freeze(indices[-1], "its entries are coordinates")
        batch = [k for k in range(len(shape)) if k not in numbers.offset_dims]
        for k, axis in zip(batch, indices[:-1], strict=True):
            shape[k] = axis
        for i, j in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        ):
            labels.unify(operand[i], indices[j])
        whole = [k for k in range(len(operand)) if k not in gone]
        for k, target in zip(whole, numbers.offset_dims, strict=True):
            if len(operand[k]) == len(shape[target]):
                shape[target] = operand[k]
            else:
                labels.freeze(operand[k], "windows are picked from it")
                labels.freeze(shape[target], "it is a window that an index picks")
        if (picked := self._constant(step)) is not None:
            axis, positions = picked
            step.uniform(operand[axis])
            shape[batch[0]] = operand[axis][positions]
        else:
            for k in numbers.collapsed_slice_dims:
                labels.freeze(operand[k], "it is looked up by values")
        return [tuple(shape)]

    def _constant(self, step: Step) -> tuple[int, np.ndarray] | None:
        """Give the axis and the positions that a list of known indices picks."""
        numbers, known = step.params["dimension_numbers"], step.known[1]
        if known is None or known.ndim != 2 or numbers.operand_batching_dims:
            return None
        if len(numbers.collapsed_slice_dims) != 1 or known.shape[1] != 1 or len(known) == 1:
            return None
        if tuple(numbers.start_index_map) != tuple(numbers.collapsed_slice_dims):
            return None
        (axis,) = numbers.collapsed_slice_dims
        positions = known[:, 0]
        inside = (positions >= 0) & (positions < len(step.operands[0][axis]))
        return (axis, positions) if inside.all() else None

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        numbers = eqn.params["dimension_numbers"]
        sizes = list(eqn.params["slice_sizes"])
        x, indices = operands
        for k, mask in enumerate(kept.operand(0)):
            if mask is None:
                continue
            if k in numbers.collapsed_slice_dims:  # known indices: renumber those that are left
                renumbered = np.cumsum(mask) - 1
                (batch,) = (j for j in range(len(eqn.outvars[0].aval.shape))
                            if j not in numbers.offset_dims)  # fmt: skip
                left = kept.result(0)[batch]
                indices = indices if left is None else jnp.asarray(indices)[np.flatnonzero(left)]
                indices = jnp.asarray(renumbered, indices.dtype)[indices]
            elif k not in numbers.operand_batching_dims:
                sizes[k] = kept.count(mask)
        return _compat.bind(eqn, [x, indices], {**eqn.params, "slice_sizes": tuple(sizes)})


@register_dims(
    "scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter_add",
    "scatter_mul", "scatter_min", "scatter_max", "scatter_sub", "scatter-sub",
)  # fmt: skip
class _Scatter:
    def follow(self, step: Step) -> list[Axes]:
        numbers, labels = step.params["dimension_numbers"], step.labels
        operand, indices, updates = step.operands
        labels.freeze(indices[-1], "its entries are coordinates")
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        for k in numbers.inserted_window_dims:
            start = self._start(step, k, 1)
            if start is None:
                labels.freeze(operand[k], "it is written at indices that are values")
            else:
                labels.freeze(operand[k][start : start + 1], "an index of it is written alone")
        whole = [k for k in range(len(operand)) if k not in gone]
        for k, j in zip(whole, numbers.update_window_dims, strict=True):
            if len(operand[k]) == len(updates[j]):
                labels.unify(operand[k], updates[j])
            else:
                self._window(step, k, updates[j])
        rest = [j for j in range(len(updates)) if j not in numbers.update_window_dims]
        for j, axis in zip(rest, indices[:-1], strict=True):
            labels.unify(updates[j], axis)
        for i, j in zip(
            numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
        ):
            labels.unify(operand[i], indices[j])
        return [operand]

    def _window(self, step: Step, k: int, update: Axis) -> None:
        """Follow an axis of which a part is written: where it starts must be known."""
        axis, start = step.operands[0][k], self._start(step, k, len(update))
        if start is None:
            step.labels.freeze_all((axis, update), "windows of it are written")
        elif len(update) == 1:
            step.labels.freeze(axis[start : start + 1], "an index of it is written alone")
        else:
            step.labels.unify(axis[start : start + len(update)], update)

    def _start(self, step: Step, k: int, size: int) -> int | None:
        """Give the known start of the one window that is written, along an axis of the operand.

        Layers of a scan then keep the same indices of it, as they write at the same place.
        """
        known, named = step.known[1], step.params["dimension_numbers"].scatter_dims_to_operand_dims
        if known is None or known.ndim != 1:
            return None
        start = int(known[named.index(k)]) if k in named else 0
        if not 0 <= start <= len(step.operands[0][k]) - size:
            return None
        step.uniform(step.operands[0][k])
        return start

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        x, indices, updates = operands
        indices = jnp.asarray(indices)
        numbers, (whole, _, part) = eqn.params["dimension_numbers"], eqn.invars
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        windows = [k for k in range(whole.aval.ndim) if k not in gone]
        sizes = dict(zip(windows, numbers.update_window_dims, strict=True))
        for i, k in enumerate(numbers.scatter_dims_to_operand_dims):
            mask = kept.operand(0)[k]
            written = part.aval.shape[sizes[k]] if k in sizes else 1
            if mask is not None and written != whole.aval.shape[k]:
                before = np.concatenate([[0], np.cumsum(mask)])
                start = jnp.asarray(before, indices.dtype)[indices[..., i]]
                indices = indices.at[..., i].set(start)
        return _compat.bind(eqn, [x, indices, updates])
