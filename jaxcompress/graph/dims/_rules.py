"""How labels go through elementwise, shape and reduction primitives."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.dims._kept import Kept
from jaxcompress.graph.dims._labels import Axis
from jaxcompress.graph.dims._rule import Axes, Step, concrete, register_dims
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._primitives import ELEMENTWISE, PASSES, arrange

_LARGEST = 1 << 22
"""The largest axis that is made by merging labelled ones."""


@register_dims(*ELEMENTWISE)
class _Elementwise:
    def follow(self, step: Step) -> list[Axes]:
        shape = step.shape()
        result: list[Axis | None] = [None] * len(shape)
        for axes in step.operands:
            if len(axes) != len(shape):  # a scalar
                continue
            for k, axis in enumerate(axes):
                if len(axis) != shape[k]:  # size 1, repeated
                    continue
                before = result[k]
                result[k] = axis if before is None else step.labels.unify(before, axis)
        fresh = step.labels.fresh
        return [tuple(fresh(n) if a is None else a for a, n in zip(result, shape, strict=True))]


@register_dims("bitcast_convert_type")
class _Bitcast:
    """Casts that split a number into smaller ones, or join some, do so along a last axis."""

    def follow(self, step: Step) -> list[Axes]:
        (axes,), shape = step.operands, step.shape()
        reason = "its entries are parts of one number"
        step.labels.freeze_all(axes[len(shape) :], reason)
        extra = [step.labels.fresh(n, frozen=reason) for n in shape[len(axes) :]]
        return [(*axes[: len(shape)], *extra)]


@register_dims("debug_callback", "debug_print")
class _Debug:
    def follow(self, step: Step) -> list[Axes]:
        return []


@register_dims("fft")
class _Fft:
    def follow(self, step: Step) -> list[Axes]:
        (axes,) = step.operands
        count = len(step.params["fft_lengths"])
        result = list(axes[: len(axes) - count])
        for axis, n in zip(axes[len(result) :], step.shape()[len(result) :], strict=True):
            step.labels.freeze(axis, "it is transformed by fft")
            made = "it counts frequencies or samples of fft"
            result.append(step.labels.fresh(n, frozen=made))
        return [tuple(result)]


@register_dims(*PASSES, "cumsum", "pmax", "pmin", "ppermute", "psum", "psum_invariant")
class _Pass:
    def follow(self, step: Step) -> list[Axes]:
        return list(step.operands)


@register_dims("squeeze", "transpose")
class _Arrange:
    def follow(self, step: Step) -> list[Axes]:
        new = lambda n: step.labels.fresh(concrete([n])[0])
        axes = arrange(step.eqn, step.operands[0], new)
        assert axes is not None
        return [tuple(axes)]


@register_dims("rev")
class _Reverse:
    def follow(self, step: Step) -> list[Axes]:
        turned = step.params["dimensions"]
        axes = enumerate(step.operands[0])
        return [tuple(axis[::-1] if k in turned else axis for k, axis in axes)]


@register_dims("broadcast_in_dim")
class _Broadcast(_Arrange):
    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        return _compat.bind(eqn, operands, {**eqn.params, "shape": kept.shape()})


@register_dims("reshape")
class _Reshape:
    def follow(self, step: Step) -> list[Axes]:
        labels, axes = step.labels, [a for a in step.operands[0] if len(a) != 1]
        shape = step.shape()
        result = [labels.fresh(1) if n == 1 else None for n in shape]
        targets = [k for k, n in enumerate(shape) if n != 1]
        if 0 in shape:
            return step.fresh()
        while axes:
            sources, sizes = [axes.pop(0)], [shape[targets[0]]]
            while (have := math.prod(map(len, sources))) != (want := math.prod(sizes)):
                if have < want:
                    sources.append(axes.pop(0))
                else:
                    sizes.append(shape[targets[len(sizes)]])
            mine, targets = targets[: len(sizes)], targets[len(sizes) :]
            for k, axis in zip(mine, self._regrouped(step, sources, sizes), strict=True):
                result[k] = axis
        return [tuple(labels.fresh(1) if axis is None else axis for axis in result)]

    def _regrouped(
        self, step: Step, sources: Sequence[Axis], sizes: Sequence[int]
    ) -> Sequence[Axis]:
        labels = step.labels
        if len(sources) == len(sizes) == 1:
            return sources
        if math.prod(sizes) > _LARGEST:
            reason = "it is merged to an axis too long to be followed"
            labels.freeze_all(sources, reason)
            return [labels.fresh(n, frozen=reason) for n in sizes]
        return labels.split(labels.merge(sources), sizes)

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        return _compat.bind(eqn, operands, {**eqn.params, "new_sizes": kept.shape()})


# --- Slices and joins -----------------------------------------------------------------------------


@register_dims("slice")
class _Slice:
    def follow(self, step: Step) -> list[Axes]:
        result = []
        starts, limits = step.params["start_indices"], step.params["limit_indices"]
        strides = step.params["strides"] or (1,) * len(starts)
        for axis, start, stop, stride, aval in zip(
            step.operands[0], starts, limits, strides, step.eqn.outvars[0].aval.shape, strict=True
        ):
            if not isinstance(stop, int):  # a symbolic dimension, whole
                result.append(axis)
                continue
            part = axis[start:stop:stride]
            if len(part) == len(axis):
                part = axis
            elif aval == 1:
                step.labels.freeze(part, "an index of it is picked alone")
                part = step.labels.fresh(1)
            if stride > 1:
                step.uniform(axis)
            elif part is not axis:
                step.cut(axis[:start])
                step.cut(part)
            result.append(part)
        return [tuple(result)]

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        params, (x,) = eqn.params, operands
        starts, limits = list(params["start_indices"]), list(params["limit_indices"])
        strides = list(params["strides"] or (1,) * len(starts))
        for k, mask in enumerate(kept.operand(0)):
            if mask is None:
                continue
            here, stop = starts[k], limits[k]
            if strides[k] > 1:
                index = kept.index(0, k, np.arange(here, stop, strides[k]))
                x = jnp.take(x, index, axis=k)
                starts[k], limits[k], strides[k] = 0, len(index), 1
            else:
                starts[k] = kept.count(mask[..., :here])
                limits[k] = kept.count(mask[..., :stop])
        changed = {
            "start_indices": tuple(starts),
            "limit_indices": tuple(limits),
            "strides": None if all(n == 1 for n in strides) else tuple(strides),
        }
        return _compat.bind(eqn, [x], {**params, **changed})


@register_dims("split")
class _Split:
    def follow(self, step: Step) -> list[Axes]:
        at, results = step.params["axis"], []
        ends = np.cumsum(step.params["sizes"])
        for part in np.split(step.operands[0][at], ends[:-1]):
            if len(part) == 1:
                step.labels.freeze(part, "an index of it is picked alone")
                part = step.labels.fresh(1)
            step.cut(part)
            axes = list(step.operands[0])
            axes[at] = part
            results.append(tuple(axes))
        return results

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        at = eqn.params["axis"]
        masks = [kept.result(k)[at] for k in range(len(eqn.outvars))]
        sizes = [
            n if mask is None else kept.count(mask)
            for n, mask in zip(eqn.params["sizes"], masks, strict=True)
        ]
        return _compat.bind(eqn, operands, {**eqn.params, "sizes": tuple(sizes)})


@register_dims("concatenate")
class _Concatenate:
    def follow(self, step: Step) -> list[Axes]:
        at = step.params["dimension"]
        result = list(step.operands[0])
        for axes in step.operands[1:]:
            for k, axis in enumerate(axes):
                if k != at:
                    step.labels.unify(result[k], axis)
        # An axis of size 1 has no label of its own: a new one, by which `resize` leaves it out.
        parts = [a[at] if len(a[at]) != 1 else step.labels.fresh(2)[:1] for a in step.operands]
        for part in parts:
            step.cut(part)
        result[at] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return [tuple(result)]

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        at = eqn.params["dimension"]
        mask, start, left = kept.result(0)[at], 0, []
        for x, atom in zip(operands, eqn.invars, strict=True):
            size = atom.aval.shape[at]
            if mask is None or size != 1 or mask[..., start].all():
                left.append(x)
            start += size
        return _compat.bind(eqn, left)


@register_dims("stack")
class _Stack:
    def follow(self, step: Step) -> list[Axes]:
        first, *others = step.operands
        for axes in others:
            for a, b in zip(first, axes, strict=True):
                step.labels.unify(a, b)
        at = step.params["axis"] % (len(first) + 1)
        parts = step.labels.fresh(len(step.operands), frozen="it counts what is stacked")
        return [(*first[:at], parts, *first[at:])]


@register_dims("unstack")
class _Unstack:
    def follow(self, step: Step) -> list[Axes]:
        (axes,), at = step.operands, step.params["axis"]
        step.labels.freeze(axes[at], "an index of it is picked alone")
        return [(*axes[:at], *axes[at + 1 :])] * len(step.eqn.outvars)


@register_dims("tile")
class _Tile:
    def follow(self, step: Step) -> list[Axes]:
        pairs = zip(step.operands[0], step.params["reps"], strict=True)
        fresh = step.labels.fresh
        return [tuple(fresh(n) if len(a) == 1 else np.tile(a, n) for a, n in pairs)]


@register_dims("pad")
class _Pad:
    def follow(self, step: Step) -> list[Axes]:
        result = []
        for k, (low, high, inner) in enumerate(step.params["padding_config"]):
            axis = step.operands[0][k]
            if (low, high, inner) == (0, 0, 0):
                result.append(axis)
            elif inner or min(low, high) < 0 or len(axis) == 1:
                step.labels.freeze(axis, "it is padded inside, or cropped")
                made = "it is made by padding"
                result.append(step.labels.fresh(step.shape()[k], frozen=made))
            else:
                new = step.labels.fresh(low + high + 1)
                step.cut(new[:low])
                step.cut(new[low : low + high])
                result.append(np.concatenate([new[:low], axis, new[low : low + high]]))
        return [tuple(result)]

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        config = [list(entry) for entry in eqn.params["padding_config"]]
        for k, mask in enumerate(kept.result(0)):
            if mask is not None and config[k] != [0, 0, 0]:
                low, high, _ = config[k]
                config[k][0] = kept.count(mask[..., :low])
                config[k][1] = kept.count(mask[..., mask.shape[-1] - high :])
        padding = tuple(tuple(entry) for entry in config)
        return _compat.bind(eqn, operands, {**eqn.params, "padding_config": padding})


@register_dims("dynamic_slice")
class _DynamicSlice:
    def follow(self, step: Step) -> list[Axes]:
        result = []
        for axis, n in zip(step.operands[0], step.shape(), strict=True):
            if len(axis) != n:
                step.labels.freeze(axis, "an index that depends on values picks from it")
                made = "it is a window at an index that depends on values"
                axis = step.labels.fresh(n, frozen=made)
            result.append(axis)
        return [tuple(result)]

    def resize(self, eqn: Any, operands: Sequence[Any], kept: Kept) -> list[Any]:
        return _compat.bind(eqn, operands, {**eqn.params, "slice_sizes": kept.shape()})


@register_dims("dynamic_update_slice")
class _DynamicUpdate:
    def follow(self, step: Step) -> list[Axes]:
        for axis, part in zip(step.operands[0], step.operands[1], strict=True):
            if len(axis) == len(part):
                step.labels.unify(axis, part)
            else:
                reason = "it is written at an index that depends on values"
                step.labels.freeze_all((axis, part), reason)
        return [step.operands[0]]


# --- Reductions -----------------------------------------------------------------------------------


@register_dims("reduce_sum", "reduce_or", "reduce_xor")
class _Reduce:
    def follow(self, step: Step) -> list[Axes]:
        gone = {k % len(step.operands[0]) for k in step.params["axes"]}
        return [tuple(a for k, a in enumerate(step.operands[0]) if k not in gone)]


def _lowest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.bool_):
        return False
    return -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.bool_):
        return True
    return jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


for rule, neutral, primitives in (
    (_Reduce, staticmethod(_lowest), ("reduce_max",)),
    (_Reduce, staticmethod(_highest), ("reduce_min", "reduce_and")),
    (_Reduce, 1, ("reduce_prod",)),
    (_Pass, staticmethod(_lowest), ("cummax", "cumlogsumexp")),
    (_Pass, staticmethod(_highest), ("cummin",)),
    (_Pass, 1, ("cumprod",)),
):
    register_dims(*primitives)(type(rule.__name__, (rule,), {"neutral": neutral}))


@register_dims("argmax", "argmin")
class _Positions:
    def follow(self, step: Step) -> list[Axes]:
        gone = set(step.params["axes"])
        for k in gone:
            step.labels.freeze(step.operands[0][k], f"{step.name} gives positions along it")
        return [tuple(a for k, a in enumerate(step.operands[0]) if k not in gone)]


@register_dims("sort")
class _Sort:
    def follow(self, step: Step) -> list[Axes]:
        at, results = step.params["dimension"], []
        for axes in step.operands:
            step.labels.freeze(axes[at], "it is sorted")
            for k, axis in enumerate(axes):
                step.labels.unify(step.operands[0][k], axis)
            results.append(axes)
        return results


@register_dims("top_k", "approx_top_k")
class _TopK:
    def follow(self, step: Step) -> list[Axes]:
        axes, results = step.operands[0], step.fresh()
        at = step.params.get("axis", step.params.get("reduction_dimension", -1)) % len(axes)
        step.labels.freeze(axes[at], f"{step.name} gives positions along it")
        for result in results:
            step.labels.freeze(result[at], f"{step.name} makes it")
        return [(*axes[:at], result[at], *axes[at + 1 :]) for result in results]


@register_dims(
    "reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min",
)  # fmt: skip
class _Window:
    def follow(self, step: Step) -> list[Axes]:
        params, result = step.params, []
        window = params["window_dimensions"]
        ones = (1,) * len(window)
        per_axis = zip(
            window,
            params["window_strides"],
            params["padding"],
            params.get("base_dilation") or ones,
            params.get("window_dilation") or ones,
            strict=True,
        )
        for k, (size, stride, padding, base, _) in enumerate(per_axis):
            axis = step.operands[0][k]
            if size == stride == base == 1 and tuple(padding) == (0, 0):
                result.append(axis)
                continue
            step.labels.freeze(axis, "a window slides over it")
            made = "it counts positions of a window"
            result.append(step.labels.fresh(step.shape()[k], frozen=made))
        return [tuple(result)] * len(step.eqn.outvars)
