"""Leaves of any layout as matrices `(*lead, in, out)`, and back as quantized leaves.

Methods see one matrix; a leaf is brought into that form by the axes that its site contracts. The
lead axes are those that tell matrices apart: stacked layers, experts, feature groups.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph import Axes, Site
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor, QArray, Scaled
from jaxcompress.quantize._explicit import replicated


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a leaf becomes matrices.

    Attributes:
        shape: The leaf's shape.
        lead: Its axes that tell matrices apart.
        inner: Its axes that are contracted, in its order; the features, for a lookup.
        outer: The others.
        feature_groups: Into how many matrices a convolution's outputs are split besides.
    """

    shape: tuple[int, ...]
    lead: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    feature_groups: int = 1

    @property
    def matrices(self) -> tuple[int, ...]:
        """The lead shape of the matrices, feature groups last."""
        groups = (self.feature_groups,) if self.feature_groups > 1 else ()
        return (*self._sizes(self.lead), *groups)

    @property
    def innermost(self) -> int:
        """The axis along which groups run: the last contracted one of more than one entry."""
        longer = [k for k in self.inner if self.shape[k] > 1]
        return longer[-1] if longer else self.inner[-1]

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[k] for k in axes)

    def to_matrices(self, leaf: Array) -> Array:
        """Bring a leaf into matrices.

        Args:
            leaf: An array of the leaf's shape.

        Returns:
            `(*matrices, in, out)`; with Explicit mesh axes, on every device.
        """
        return replicated(self._to_matrices, leaf)

    def _to_matrices(self, leaf: Array) -> Array:
        x = jnp.transpose(leaf, (*self.lead, *self.inner, *self.outer))
        lead, inner = self._sizes(self.lead), math.prod(self._sizes(self.inner))
        x = x.reshape(*lead, inner, self.feature_groups, -1)  # (*lead, in, groups, out)
        if self.feature_groups == 1:
            return jnp.squeeze(x, -2)
        return jnp.moveaxis(x, -2, -3)  # (*lead, groups, in, out)

    def to_leaf(self, matrices: Array, *, ones: bool = False) -> Array:
        """Bring matrices back.

        Args:
            matrices: `(*matrices, in, out)`, or with 1 for `in` and, likewise, for `out`.
            ones: Whether `in` is 1: one entry for all that is contracted.

        Returns:
            An array of the leaf's shape, with 1 where the matrices had it; with Explicit mesh
            axes, on every device.
        """
        return replicated(functools.partial(self._to_leaf, ones=ones), matrices)

    def _to_leaf(self, matrices: Array, *, ones: bool) -> Array:
        if self.feature_groups > 1:
            matrices = jnp.moveaxis(matrices, -3, -2)
            matrices = matrices.reshape(*matrices.shape[:-2], -1)  # (*lead, in, outs)
        inner = (1,) * len(self.inner) if ones else self._sizes(self.inner)
        whole = matrices.shape[-1] == math.prod(self._sizes(self.outer))
        outer = self._sizes(self.outer) if whole else (1,) * len(self.outer)
        x = matrices.reshape(*self._sizes(self.lead), *inner, *outer)
        order = np.argsort((*self.lead, *self.inner, *self.outer))
        return jnp.transpose(x, order.tolist())

    def without(self, axes: Sequence[int]) -> "Form":
        """Describe a slice of the leaf, one index of some lead axes.

        Args:
            axes: Those axes.

        Returns:
            The form of the slice.
        """

        def renumbered(which: Sequence[int]) -> tuple[int, ...]:
            return tuple(k - sum(a < k for a in axes) for k in which if k not in axes)

        return replace(
            self,
            shape=tuple(n for k, n in enumerate(self.shape) if k not in axes),
            lead=renumbered(self.lead),
            inner=renumbered(self.inner),
            outer=renumbered(self.outer),
        )


def form_of(shape: Sequence[int], axes: Axes, feature_groups: int = 1) -> Form:
    """Find the matrices of a leaf from its axes at a site.

    Args:
        shape: The leaf's shape.
        axes: Its axes by role.
        feature_groups: The site's feature groups.

    Returns:
        The form. At a lookup a matrix is `(features, rows)`.
    """
    if axes.lookup:
        inner, outer = axes.output, axes.lookup
    else:
        inner, outer = (*axes.contract, *axes.spatial), axes.output
    named = {*inner, *outer}
    lead = tuple(k for k in range(len(shape)) if k not in named and shape[k] > 1)
    spare = tuple(k for k in range(len(shape)) if k not in named and shape[k] == 1)
    return Form(
        shape=tuple(shape),
        lead=lead,
        inner=tuple(sorted((*inner, *spare))),
        outer=tuple(sorted(outer)),
        feature_groups=feature_groups,
    )


def form_at(shape: Sequence[int], sites: Sequence[Site]) -> Form:
    """Find the matrices of a leaf from its sites.

    Args:
        shape: The leaf's shape.
        sites: Its sites, at least one. The one of most FLOPs that contracts it counts; the first
            where it is looked up, if none does.

    Returns:
        The form.
    """
    contracting = [site for site in sites if not site.axes.lookup]
    main = max(contracting, key=lambda site: site.flops) if contracting else sites[0]
    return form_of(shape, main.axes, main.feature_groups)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format in terms of a leaf, and of its matrices.

    Attributes:
        leaf: With the leaf's axes.
        matrix: Per tensor, per channel of axis -1, or in groups along axis -2; `None` if the
            granularity is not one of these, and only rounding to nearest can follow it.
        note: What was changed, if anything.
    """

    leaf: Format
    matrix: Format | None
    note: str = ""


def target_of(format: Format, form: Form) -> Target:
    """Say what a rule's format means for a leaf.

    `PerChannel()`, `PerGroup(n)` and `PerTensor()` as written follow the site, whatever the
    leaf's layout: a scale per output, groups along the innermost contracted axis, one scale per
    matrix (layer, expert). Granularities with other axes mean those axes of the leaf.

    Args:
        format: The rule's format.
        form: The leaf's form.

    Returns:
        The target. A group size that does not divide its axis is replaced, with a note: by the
        whole axis if that is shorter, else by the largest divisor of the axis below it, down to
        an eighth of it.
    """
    granularity, ndim = format.granularity, len(form.shape)
    if granularity == PerTensor():
        kept = PerChannel(tuple(k - ndim for k in form.lead)) if form.lead else granularity
        return Target(
            leaf=replace(format, granularity=kept),
            matrix=None if form.feature_groups > 1 else format,
        )
    if granularity == PerChannel():
        kept = PerChannel(tuple(k - ndim for k in sorted((*form.lead, *form.outer))))
        return Target(leaf=replace(format, granularity=kept), matrix=format)
    if isinstance(granularity, PerGroup) and granularity.axis == -2 and form.inner:
        axis = form.innermost
        size, note = _dividing(granularity.size, form.shape[axis])
        leaf = replace(format, granularity=PerGroup(size, axis - ndim))
        matrix = replace(format, granularity=PerGroup(size, -2))
        # Feature groups have one global scale for all of them.
        alone = format.global_scale and form.feature_groups > 1
        return Target(leaf=leaf, matrix=None if alone else matrix, note=note)
    return Target(leaf=format, matrix=None)


def follows_site(format: Format) -> bool:
    """Tell whether a site decides what a format means, or its own axes do; see `target_of`."""
    granularity = format.granularity
    if isinstance(granularity, PerGroup):
        return granularity.axis == -2
    return granularity in (PerTensor(), PerChannel())


def _dividing(size: int, length: int) -> tuple[int, str]:
    if length % size == 0:
        return size, ""
    best = max(n for n in range(1, min(size, length) + 1) if length % n == 0)
    if best == length:
        return length, f"one group of {length}, which is all there is"
    if best * 8 < size:
        return size, ""  # an obstacle
    return best, f"groups of {best}, since {size} does not divide {length}"


def assemble(parts: QArray, form: Form, target: Target, dtype: Any) -> QArray:
    """Make a quantized leaf of quantized matrices.

    Args:
        parts: A `QArray` whose arrays have the lead axes of `form.matrices` in front.
        form: The leaf's form.
        target: Its format.
        dtype: The leaf's dtype.

    Returns:
        The quantized leaf.
    """
    assert target.matrix is not None
    granularity = target.leaf.granularity
    grouped = isinstance(granularity, PerGroup)
    axis = form.innermost if grouped else len(form.shape)
    counts = list(form.shape)
    if isinstance(granularity, PerGroup):
        counts[axis] //= granularity.size
    coarse = replace(form, shape=tuple(counts))

    def one(part: Array | None) -> Array | None:
        """Bring a part with one entry per slice back."""
        if part is None:
            return None
        if not grouped:
            return form.to_leaf(part, ones=True)
        # (*matrices, groups, 1, out) -> the leaf with its innermost contracted axis in two
        return jnp.expand_dims(coarse.to_leaf(jnp.squeeze(part, -2)), axis + 1)

    several = not isinstance(target.leaf.qtype, Scaled)  # scales, along a last axis
    each = jax.vmap(one, in_axes=-1, out_axes=-1) if several else one
    values = parts.values
    if grouped:
        values = values.reshape(*values.shape[:-3], -1, values.shape[-1])
    changes: dict[str, Any] = {}
    if parts.global_scale is not None:
        # One per matrix, as many axes as the scale.
        shape = [n if k in form.lead else 1 for k, n in enumerate(form.shape)]
        shape[axis + 1 : axis + 1] = [1] * grouped
        shape += [1] * several
        changes["global_scale"] = parts.global_scale.reshape(shape)
    return replace(
        parts,
        values=granularity.block(form.to_leaf(values)),
        scale=each(parts.scale),
        zero=one(parts.zero),
        format=target.leaf,
        dtype=dtype,
        **changes,
    )
