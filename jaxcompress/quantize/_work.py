"""One leaf on its way to its stored form, whole or slice by slice."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import linalg, numerics
from jaxcompress.graph import Site
from jaxcompress.graph.sites import Form
from jaxcompress.numerics import Activation, QArray
from jaxcompress.quantize import _ranges
from jaxcompress.quantize._bias import bias_shift
from jaxcompress.quantize._matrix import assemble
from jaxcompress.quantize._method import Method, RoundToNearest
from jaxcompress.quantize._plan import Task
from jaxcompress.quantize._shardings import place_codes
from jaxcompress.stats import by_matrix, merge_results

Picks: TypeAlias = tuple[tuple[int, int], ...]
"""Which slice of a leaf: `(axis, index)` pairs, sorted; empty for the whole leaf."""


class Work:
    """One leaf on its way to its stored form, whole or slice by slice.

    Args:
        task: What is to be done with it.
        leaf: The leaf.
    """

    def __init__(self, task: Task, leaf: Any):
        self.task, self.leaf = task, leaf
        self.notes = list(task.notes)
        self.diagnostics: dict[str, float] = {}
        self._parts: dict[Picks, QArray] = {}
        self._means: dict[Picks, jax.Array] = {}
        static = task.activations if task.range_key else None
        apart = {k for s in task.sites for k in (*s.axes.stacked, *s.axes.sliced)}
        self._ranges = static and _ranges.Ranges(task.path, task.form, static, apart)

    def has(self, picks: Mapping[int, int]) -> bool:
        """Tell whether a slice (`{axis: index}`) has been quantized."""
        return tuple(sorted(picks.items())) in self._parts

    def watch(self, site: Site, results: Mapping[str, Any], picks: dict[int, int]) -> None:
        """Take in the range and the mean of the activation at a site.

        Args:
            site: The site, of the slice.
            results: What was seen there, by key.
            picks: `{axis: index}` of the slice; empty for the whole leaf.
        """
        form, here = self.task.form.without(tuple(picks)), tuple(sorted(picks.items()))
        mean_key, range_key = self.task.mean_key, self.task.range_key
        if mean_key is not None and len(self.task.sites) == 1:
            self._means[here] = by_matrix(results[mean_key], site, form).mean
        if self._ranges is not None and range_key is not None:
            left = [k for k in range(len(self.task.form.shape)) if k not in picks]
            named = tuple(None if k is None else left[k] for k in site.layers)
            self._ranges.add(results[range_key], named, picks)

    def quantize(
        self,
        leaf: Any,
        found: list[tuple[Site, Mapping[str, Any]]],
        picks: Mapping[int, int],
    ) -> jax.Array:
        """Quantize the leaf, or a slice of it.

        Args:
            leaf: The array.
            found: Sites, with what was seen there.
            picks: `{axis: index}` of the slice; empty for the whole leaf.

        Returns:
            The array that the stored form stands for.
        """
        task, form = self.task, self.task.form.without(tuple(picks))
        if task.target.matrix is None:
            q = numerics.quantize(leaf, task.target.leaf)
            self._parts[()] = q
            return numerics.dequantize(q)
        seen = {
            name: merge_results([by_matrix(r[key], s, form) for s, r in found])
            for name, key in task.method_keys.items()
        }
        matrices = form.to_matrices(jnp.asarray(leaf).astype(jnp.float32))
        parts, info = _quantize_matrices(matrices, seen, task.method, task.target.matrix)
        for name, values in info.items():
            worst = float(np.max(np.asarray(values)))
            self.diagnostics[name] = max(worst, self.diagnostics.get(name, worst))
        self._parts[tuple(sorted(picks.items()))] = parts
        return form.to_leaf(numerics.dequantize(parts)).astype(leaf.dtype)

    def finish(self) -> QArray:
        """Put the slices together, with the form of the activations beside them."""
        task = self.task
        if task.target.matrix is None:
            q = self._parts[()]
        else:
            q = assemble(self._combine(), task.form, task.target, self.leaf.dtype)
        if task.activations is not None:
            static = None if self._ranges is None else self._ranges.settle()
            q = replace(q, activation=static or Activation(format=task.activations))
        return place_codes(q, self.leaf)

    def shift(self) -> jax.Array | None:
        """Give the mean error of each output, `(*matrices, out)`; `None` if no mean was seen."""
        if not self._means or self.task.target.matrix is None:
            return None
        axes = [k for k, _ in next(iter(self._means))]
        if any(picks not in self._means for picks in _list_slices(self.task.form, axes)):
            return None
        means = self._stack_slices(self._means)
        w = self.task.form.to_matrices(jnp.asarray(self.leaf).astype(jnp.float32))
        w_hat = numerics.dequantize(self._combine())
        return linalg.vmap_leading(bias_shift, len(self.task.form.matrices))(w, w_hat, means)

    def _combine(self) -> QArray:
        """Put the slices together; those that nothing reached are rounded to nearest."""
        matrix, axes = self.task.target.matrix, [k for k, _ in next(iter(self._parts))]
        assert matrix is not None
        missing = [
            picks for picks in _list_slices(self.task.form, axes) if picks not in self._parts
        ]
        for picks in missing:
            where = tuple(dict(picks).get(k, slice(None)) for k in range(self.leaf.ndim))
            form = self.task.form.without([k for k, _ in picks])
            matrices = form.to_matrices(self.leaf[where].astype(jnp.float32))
            self._parts[picks], _ = _quantize_matrices(matrices, {}, RoundToNearest(), matrix)
        if missing:
            self.notes.append(
                f"{len(missing)} slices rounded to nearest, since nothing reached them"
            )
        return self._stack_slices(self._parts)

    def _stack_slices(self, parts: Mapping[Picks, Any]) -> Any:
        """Stack slices along the lead axes that were picked from."""
        axes, form = [k for k, _ in next(iter(parts))], self.task.form
        if not axes:
            return parts[()]
        rest = [k for k in form.lead if k not in axes]
        order = [[*axes, *rest].index(k) for k in form.lead]

        def stack(*slices: jax.Array) -> jax.Array:
            x = jnp.stack(slices)
            x = x.reshape(*(form.shape[k] for k in axes), *x.shape[1:])
            return jnp.transpose(x, [*order, *range(len(order), x.ndim)])

        return jax.tree.map(stack, *(parts[picks] for picks in _list_slices(form, axes)))


def _list_slices(form: Form, axes: Sequence[int]) -> list[Picks]:
    """List all slices along some axes, in row-major order."""
    ranges = (range(form.shape[k]) for k in axes)
    return [tuple(zip(axes, index, strict=True)) for index in itertools.product(*ranges)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantize_matrices(
    matrices: jax.Array, seen: Mapping[str, Any], method: Method, format: numerics.Format
) -> tuple[QArray, dict[str, jax.Array]]:
    """Map a method over `(*lead, in, out)`."""
    call = lambda w, seen: method(w, format, seen)
    return linalg.vmap_leading(call, matrices.ndim - 2)(matrices, seen)
