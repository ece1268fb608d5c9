"""Sites: the equations that contract a leaf or look it up, and how each reads its axes.

A site rule says, for one primitive and one weight operand, which axes contract, which are output
and which batch. Rules are registered by primitive name; the built-in ones use the same door.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxcompress.graph.program._rules import Rules
from jaxcompress.graph.sites._views import AxisFactors, Factor, View, elements


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a leaf at a site, by role; every axis of more than one entry has a role.

    Attributes:
        contract: Axes that are summed over.
        output: Axes that the result keeps.
        batch: Axes shared with the activation: experts, `vmap`.
        spatial: The window of a convolution; it is summed over too.
        group: The output axis of a convolution with several feature groups.
        lookup: Axes that indices pick from.
        stacked: Axes that an enclosing scan takes apart: layers.
        sliced: Axes that the site does not see: one index of them, as in `kernel[i]`, or none.
    """

    contract: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    spatial: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    lookup: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    sliced: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an equation's arrays become rows: what a site rule returns.

    Attributes:
        axes: The leaf's axes by role; which are stacked or sliced is filled in.
        activation: Which operand of the equation is the activation.
        flops: Of one run, 2 per multiply-add.
        rows: Activation to `(*batch, tokens, features)`.
        output_rows: Result to `(*batch, tokens, outputs)`.
        channels: As `rows`, without the patches of a convolution; `rows` if `None`.
        observed: Operands to the activation that observers get; the activation if `None`.
        observed_output: Operands and result to the output that observers get; the result if
            `None`.
        feature_groups: The feature groups of a convolution.
    """

    axes: Axes
    activation: int = 0
    flops: int
    rows: Callable[[Array], Array]
    output_rows: Callable[[Array], Array]
    channels: Callable[[Array], Array] | None = None
    observed: Callable[[Sequence[Any]], Any] | None = None
    observed_output: Callable[[Sequence[Any], Any], Any] | None = None
    feature_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where a leaf is contracted or looked up.

    Attributes:
        name: Unique in the graph: the leaf's path, with `#1`, `#2`, ... from its second site on.
        path: The leaf's path.
        primitive: The primitive's name, such as `dot_general`.
        operand: Which operand of the equation is the weight.
        axes: The leaf's axes by role.
        activation: Shape and dtype of the other operand in one run (the indices of a lookup).
        weight: Shape and dtype of the weight as the equation sees it.
        output: Shape and dtype of the result of one run.
        source: Sites with equal source read the same activation: query, key and value, say.
        upstream: Names of the sites that its activation comes from, without those that also feed
            another of them (so a skip beside a longer way is not listed).
        beside: Names of the other sites of its equation: leaves that it contracts together,
            joined to one operand or multiplied with each other.
        stack: Lengths of the enclosing scans, outermost first: the leading axes of whatever is
            collected here.
        layers: For each entry of `stack` the leaf axis that this scan takes apart, index by
            index; `None` where it does something else.
        repeats: How often it runs in one call of fn, on all devices of a `shard_map`.
        bounded: `False` inside a `while` loop, whose length nobody knows: one iteration counts.
        scope: The constructs around it, outermost first: `jit(block)`, `scan`, `cond[1]`.
        through: The primitives between the leaf and the site.
        aligned: Whether `rows` and `output_rows` run through the leaf's own indices in order: not
            so where fn slices, pads, joins, permutes or reverses the leaf before contracting it.
        flops: Floating point operations over all repeats, 2 per multiply-add.
        bytes: Bytes over all repeats: the weight as stored, the activation, the result.
        feature_groups: The feature groups of a convolution, 1 elsewhere.
        layout: How its arrays become rows; `rows`, `channels` and `output_rows` apply it.
    """

    name: str
    path: str
    primitive: str
    operand: int
    axes: Axes
    activation: jax.ShapeDtypeStruct
    weight: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct
    source: int
    upstream: tuple[str, ...]
    beside: tuple[str, ...]
    stack: tuple[int, ...]
    layers: tuple[int | None, ...]
    repeats: int
    bounded: bool
    scope: tuple[str, ...]
    through: tuple[str, ...]
    aligned: bool
    flops: int
    bytes: int
    feature_groups: int
    layout: Layout = field(repr=False, compare=False)

    def rows(self, activation: ArrayLike) -> Array:
        """Bring an activation of one run into the form in which the weight contracts it.

        Args:
            activation: An array like `Site.activation`.

        Returns:
            `(*batch, tokens, features)`: features run over the contraction axes in the leaf's
            order (if `aligned`), for a convolution over its patches; a convolution with feature
            groups has them as its batch. A lookup's indices come as `(tokens, 1)`.
        """
        return self.layout.rows(jnp.asarray(activation))

    def channels(self, activation: ArrayLike) -> Array:
        """Bring an activation into rows without the patches of a convolution.

        Args:
            activation: An array like `Site.activation`.

        Returns:
            `(*batch, positions, channels)`; equal to `rows` except for convolutions.
        """
        return (self.layout.channels or self.layout.rows)(jnp.asarray(activation))

    def output_rows(self, output: ArrayLike) -> Array:
        """Bring a result of one run into rows that align with `rows`.

        Args:
            output: An array like `Site.output`.

        Returns:
            `(*batch, tokens, outputs)`.
        """
        return self.layout.output_rows(jnp.asarray(output))


SiteRule: TypeAlias = Callable[[Any, int, View, Sequence[bool]], Layout | None]
"""`(eqn, operand, view, which operands vary with the inputs) -> layout`, `None` for no site."""

_RULES: Rules[SiteRule] = Rules()
_RAGGED = "ragged_dot_dimension_numbers"


def register_site(*primitives: str) -> Callable[[SiteRule], SiteRule]:
    """Say how a primitive contracts a leaf or looks it up.

    The rule gets the equation, the number of the operand that shows a leaf, its `View`, and
    which operands vary with fn's inputs. It returns a `Layout`, or `None` where this is no site:
    the leaf is then followed on by the primitive's view rule, if there is one.

    Args:
        *primitives: Names of primitives.

    Returns:
        A decorator that registers the rule and returns it.
    """
    return _RULES.register(*primitives)


def site_rule(primitive: str) -> SiteRule | None:
    return _RULES.get(primitive)


def contraction_flops(eqn: Any) -> int:
    """Count the floating point operations of one run of a contraction, 2 per multiply-add.

    A convolution counts every window position, those over padding and dilation zeros too.
    """
    found = summed_axes(eqn)
    if found is None:
        return 0
    operand, axes = found
    out, numbers = elements(eqn.outvars[0].aval.shape), eqn.params.get(_RAGGED)
    if numbers is not None and set(numbers.lhs_ragged_dimensions) & set(axes):
        out //= eqn.outvars[0].aval.shape[0]  # each group sums its own part of the contraction
    return 2 * out * elements([eqn.invars[operand].aval.shape[k] for k in axes])


def summed_axes(eqn: Any) -> tuple[int, Sequence[int]] | None:
    """Give an operand of a contraction, and which of its axes are summed over.

    Those of a convolution are the kernel's: input channels of one group, and space.
    """
    match eqn.primitive.name:
        case "dot_general":
            return 0, eqn.params["dimension_numbers"][0][0]
        case "conv_general_dilated":
            return 1, eqn.params["dimension_numbers"].rhs_spec[1:]
        case "ragged_dot_general":
            return 0, eqn.params[_RAGGED].dot_dimension_numbers[0][0]
    return None


def struct(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(atom.aval.shape), atom.aval.dtype)


class _Group(NamedTuple):
    """Axes that are merged to one; with factors, in the order of the leaf that these show."""

    axes: Sequence[int]
    factors: Sequence[AxisFactors] = ()


def _make_arrange(batch: Sequence[int], *groups: _Group) -> Callable[[Array], Array]:
    """Transpose to the batch axes, then merge each group of axes to one."""

    def arrange(x: Array) -> Array:
        x = jnp.transpose(x, [*batch, *(k for group in groups for k in group.axes)])
        first = len(batch)
        split, order, merged = list(x.shape[:first]), list(range(first)), list(x.shape[:first])
        sizes = iter(x.shape[first:])
        for group in groups:
            pieces: list[Factor] = []
            for i, size in zip(range(len(group.axes)), sizes, strict=False):
                known = group.factors[i] if group.factors else ()
                whole = math.prod(factor.size for factor in known) == size
                pieces += known if whole else [Factor((), size)]
            start = len(split)
            split += [piece.size for piece in pieces]
            # Within a leaf axis the larger stride is the major part.
            by_leaf = sorted(range(len(pieces)), key=lambda i: (pieces[i].axes, -pieces[i].stride))
            order += [start + i for i in by_leaf]
            merged.append(math.prod(piece.size for piece in pieces))
        return x.reshape(split).transpose(order).reshape(merged)  # (*batch, *groups)

    return arrange


@register_site("dot_general")
def _dot_general(eqn: Any, operand: int, view: View, varies: Sequence[bool]) -> Layout:
    (contracts, batches) = eqn.params["dimension_numbers"]
    other = 1 - operand
    w_contract, x_contract = contracts[operand], contracts[other]
    w_batch, x_batch = batches[operand], batches[other]
    w_rank, x_rank = len(eqn.invars[operand].aval.shape), len(eqn.invars[other].aval.shape)
    w_free = [k for k in range(w_rank) if k not in (*w_contract, *w_batch)]
    x_free = [k for k in range(x_rank) if k not in (*x_contract, *x_batch)]
    # The result has the batch axes, then the free axes of the first operand, then the second's.
    batch = list(range(len(x_batch)))
    after_first = len(batch) + (len(w_free) if operand == 0 else len(x_free))
    result_rank = len(batch) + len(w_free) + len(x_free)
    first, second = list(range(len(batch), after_first)), list(range(after_first, result_rank))
    out_w, out_x = (first, second) if operand == 0 else (second, first)
    shown = lambda axes: [view.axes[k] for k in axes]
    rows = _make_arrange(x_batch, _Group(x_free), _Group(x_contract, shown(w_contract)))
    output_rows = _make_arrange(batch, _Group(out_x), _Group(out_w, shown(w_free)))
    return Layout(
        axes=Axes(
            contract=view.leaf_axes(w_contract),
            output=view.leaf_axes(w_free),
            batch=view.leaf_axes(w_batch),
        ),
        activation=other,
        flops=contraction_flops(eqn),
        rows=rows,
        output_rows=output_rows,
    )


def _split_groups(x: Array, groups: int, rest: Sequence[int]) -> Array:
    """Bring (tokens, C, *rest), its last axes reordered, to (groups,) tokens, features."""
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    x = jnp.transpose(x, (1, 0, *[2 + k for k in rest]))
    x = x.reshape(groups, x.shape[1], -1)
    return x if groups > 1 else x[0]


def _flatten_positions(x: Array, spec: Sequence[int]) -> Array:
    x = jnp.transpose(x, (spec[0], *spec[2:], spec[1]))  # (N, *spatial, C)
    return x.reshape(-1, x.shape[-1])


def _extract_patches(eqn: Any, x: Array) -> Array:
    """Give what a convolution's window sees at each position: (tokens, C, *window)."""
    numbers = eqn.params["dimension_numbers"]
    window = [eqn.invars[1].aval.shape[k] for k in numbers.rhs_spec[2:]]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    patches = lax.conv_general_dilated_patches(
        x,
        filter_shape=window,
        **{name: eqn.params[name] for name in names},
        dimension_numbers=lax.ConvDimensionNumbers(
            numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        ),
        precision=lax.Precision.HIGHEST,  # a copy, not an approximation of one
    )
    flat = _flatten_positions(patches, numbers.out_spec)  # (tokens, C * window)
    return flat.reshape(flat.shape[0], -1, *window)


@register_site("conv_general_dilated")
def _lay_out_conv(eqn: Any, operand: int, view: View, varies: Sequence[bool]) -> Layout | None:
    if operand != 1 or eqn.params["batch_group_count"] != 1:
        return None
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out, inside, *spatial = numbers.rhs_spec
    held = [tuple(k for f in view.axes[axis] for k in f.axes) for axis in (inside, *spatial)]
    order = sorted(range(len(held)), key=lambda k: held[k])
    flatten = lambda x, spec: _split_groups(_flatten_positions(x, spec), groups, [0])
    return Layout(
        axes=Axes(
            contract=view.leaf_axes([inside]),
            output=view.leaf_axes([out]),
            spatial=view.leaf_axes(spatial),
            group=view.leaf_axes([out]) if groups > 1 else (),
        ),
        flops=contraction_flops(eqn),
        rows=lambda x: _split_groups(_extract_patches(eqn, x), groups, order),
        channels=lambda x: flatten(x, numbers.lhs_spec),
        output_rows=lambda y: flatten(y, numbers.out_spec),
        feature_groups=groups,
    )


@register_site("gather")
def _lay_out_gather(eqn: Any, operand: int, view: View, varies: Sequence[bool]) -> Layout | None:
    if operand != 0 or not varies[1]:
        return None  # constant indices only rearrange the leaf
    numbers = eqn.params["dimension_numbers"]
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    batch = numbers.operand_batching_dims
    picked = [k for k in numbers.start_index_map if sizes[k] != shape[k]]
    kept = [k for k in range(len(shape)) if k not in picked and k not in batch]
    result_rank = len(eqn.outvars[0].aval.shape)
    tokens = [k for k in range(result_rank) if k not in numbers.offset_dims]
    return Layout(
        axes=Axes(
            output=view.leaf_axes(kept),
            batch=view.leaf_axes(batch),
            lookup=view.leaf_axes(picked),
        ),
        activation=1,
        flops=0,
        rows=lambda indices: indices.reshape(-1, indices.shape[-1]),
        output_rows=_make_arrange((), _Group(tokens), _Group(numbers.offset_dims)),
    )


@register_site("dynamic_slice")
def _dynamic_slice(eqn: Any, operand: int, view: View, varies: Sequence[bool]) -> Layout | None:
    """Look up consecutive entries, as `table[i]` does one; the counter of a loop only slices."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    picked = [k for k in range(len(shape)) if sizes[k] != shape[k]]
    if operand != 0 or len(picked) != 1 or not varies[1 + picked[0]]:
        return None
    (axis,) = picked
    kept = [k for k in range(len(shape)) if k != axis]

    def rows(start: Array) -> Array:
        start = jnp.clip(start, 0, shape[axis] - sizes[axis])  # as XLA does
        return (start + jnp.arange(sizes[axis], dtype=start.dtype))[:, None]

    return Layout(
        axes=Axes(output=view.leaf_axes(kept), lookup=view.leaf_axes([axis])),
        activation=1 + axis,
        flops=0,
        rows=rows,
        output_rows=_make_arrange((), _Group([axis]), _Group(kept)),
    )


@register_site("ragged_dot_general")
def _ragged_dot(eqn: Any, operand: int, view: View, varies: Sequence[bool]) -> Layout | None:
    numbers = eqn.params[_RAGGED]
    (x_contract, w_contract), (x_batch, _) = numbers.dot_dimension_numbers
    (group,), (ragged,) = numbers.rhs_group_dimensions or (None,), numbers.lhs_ragged_dimensions
    if operand != 1 or group is None or x_batch or ragged in x_contract:
        return None  # only `jax.lax.ragged_dot` itself: tokens sorted by group
    w_free = [k for k in range(3) if k not in (group, *w_contract)]
    count = eqn.invars[1].aval.shape[group]
    token = _make_arrange((), _Group([ragged]), _Group(x_contract))

    def by_expert(rows: Array, sizes: Array) -> Array:
        # (tokens, features) -> (experts, tokens, features), zero for tokens of other experts
        owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
        mine = owner[None, :] == jnp.arange(count)[:, None]
        return jnp.where(mine[:, :, None], rows, jnp.zeros((), rows.dtype))

    def rows(x: Array) -> Array:
        return x if x.ndim == 3 else token(x)

    return Layout(
        axes=Axes(
            contract=view.leaf_axes(w_contract),
            output=view.leaf_axes(w_free),
            batch=view.leaf_axes([group]),
        ),
        flops=contraction_flops(eqn),
        rows=rows,
        output_rows=lambda y: y,
        observed=lambda operands: by_expert(token(operands[0]), operands[2]),
        observed_output=lambda operands, result: by_expert(result, operands[2]),
    )
