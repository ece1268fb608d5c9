"""Leaves of any layout as matrices `(*lead, in, out)`, and back.

Methods see one matrix; a leaf is brought into that form by the axes that its site contracts. The
lead axes are those that tell matrices apart: stacked layers, experts, feature groups.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph.sites._sites import Axes, Site
from jaxcompress.meshes import call_with_auto_axes


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
        return call_with_auto_axes(self._to_matrices, leaf)

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
        return call_with_auto_axes(functools.partial(self._to_leaf, ones=ones), matrices)

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


def list_observed(sites: Sequence[Site], form: Form) -> tuple[Site, ...]:
    """List the sites whose activations show what a leaf's matrices contract.

    Args:
        sites: Sites of the leaf.
        form: Its matrices.

    Returns:
        Those that contract its inner axes, in its own order.
    """
    return tuple(
        s for s in sites if s.aligned and form_of(form.shape, s.axes, s.feature_groups) == form
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
