"""What a format means for the matrices of a leaf, and quantized leaves made of matrices."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.graph.sites import Form
from jaxcompress.numerics import Format, PerChannel, PerGroup, PerTensor, QArray, Scaled


@dataclass(frozen=True, kw_only=True)
class LeafFormat:
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


def resolve_format(format: Format, form: Form) -> LeafFormat:
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
        return LeafFormat(
            leaf=replace(format, granularity=kept),
            matrix=None if form.feature_groups > 1 else format,
        )
    if granularity == PerChannel():
        kept = PerChannel(tuple(k - ndim for k in sorted((*form.lead, *form.outer))))
        return LeafFormat(leaf=replace(format, granularity=kept), matrix=format)
    if isinstance(granularity, PerGroup) and granularity.axis == -2 and form.inner:
        axis = form.innermost
        size, note = _find_divisor(granularity.size, form.shape[axis])
        leaf = replace(format, granularity=PerGroup(size, axis - ndim))
        matrix = replace(format, granularity=PerGroup(size, -2))
        # Feature groups have one global scale for all of them.
        alone = format.global_scale and form.feature_groups > 1
        return LeafFormat(leaf=leaf, matrix=None if alone else matrix, note=note)
    return LeafFormat(leaf=format, matrix=None)


def follows_site(format: Format) -> bool:
    """Tell whether a site decides what a format means, or its own axes do; see `resolve_format`."""
    granularity = format.granularity
    if isinstance(granularity, PerGroup):
        return granularity.axis == -2
    return granularity in (PerTensor(), PerChannel())


def _find_divisor(size: int, length: int) -> tuple[int, str]:
    if length % size == 0:
        return size, ""
    best = max(n for n in range(1, min(size, length) + 1) if length % n == 0)
    if best == length:
        return length, f"one group of {length}, which is all there is"
    if best * 8 < size:
        return size, ""  # an obstacle
    return best, f"groups of {best}, since {size} does not divide {length}"


def assemble(parts: QArray, form: Form, target: LeafFormat, dtype: Any) -> QArray:
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
