"""`perturb`: offsets that are added to activations at chosen sites."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import StructureError
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.program._run import Equation
from jaxcompress.graph.sites._intercept import UNREACHABLE, Go, SiteLayer, run_layers
from jaxcompress.graph.sites._select import Side, check_side, choose_sites, refuse_inside
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, call_of


def perturb(
    fn: Callable[..., Any] | Traced, where: tree.Where, *, at: Side = "output"
) -> Callable[..., Any]:
    """Make a function that adds offsets to activations at chosen sites.

    The gradient with respect to an offset is the gradient of the activation, which Fisher and
    Taylor criteria need.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or what `capture` made of it.
        where: Leaves at whose sites offsets are added; see `tree.matches`.
        at: "output" for the result of the contraction, "input" for the activation that goes in.

    Returns:
        A function `(params, offsets, *inputs, **kwargs) -> outputs`, offsets being
        `{Site.name: array}` of shape `Site.stack + Site.output.shape` (or `Site.activation`'s).
        Sites that `offsets` leaves out get none.

    Raises:
        ArgumentError: If `at` is neither; when called, if a site lies inside a function with its
            own differentiation rule or in the condition of a loop, where gradients do not reach.
        SelectionError: When called, if `where` selects no site.
        StructureError: When called, if an offset is of no such site, or of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda p, x: (jnp.sin(x @ p["a"])).sum()
        >>> params, x = {"a": jnp.ones((3, 2))}, jnp.zeros((1, 3))
        >>> offsets = {"a": jnp.zeros((1, 2))}
        >>> jax.grad(perturb(fn, "a"), argnums=1)(params, offsets, x)["a"].tolist()
        [[1.0, 1.0]]
    """
    check_side(at)

    def perturbed(
        params: tree.Params, offsets: Mapping[str, Any], *inputs: Any, **kwargs: Any
    ) -> Any:
        traced = call_of(fn, params, inputs, kwargs)
        names = choose_sites(traced, where)
        unknown = sorted(set(offsets) - set(names))
        if unknown:
            raise StructureError(
                "offsets",
                got=f"entries for {unknown}",
                expected=f"names of sites that `where` selects: {names[:8]}",
                fix="Use Site.name of `trace(fn, params, *inputs).sites`.",
            )
        refuse_inside(traced, sorted(offsets), UNREACHABLE, "gradients do not reach inside")
        _check_offsets(traced, offsets, at)
        layers = {name: [make_perturb_layer(at, name)] for name in offsets}
        args = params, inputs, kwargs
        return run_layers(traced, args, layers, dict(offsets), fills=False)[0]

    return perturbed


def make_perturb_layer(at: Side, cell: str) -> SiteLayer:
    """Make a layer that adds a cell to one of a site's arrays."""

    def around(
        equation: Equation, site: Site, go: Go, operands: list[Any], cells: Cells
    ) -> tuple[list[Any], Cells]:
        if at == "input":
            operands = list(operands)
            operands[site.layout.activation] += cells[cell]
            return go(operands, cells)
        results, filled = go(operands, cells)
        return [results[0] + cells[cell]], filled

    return SiteLayer(around, (cell,))


def _check_offsets(traced: Traced, offsets: Mapping[str, Any], at: Side) -> None:
    for site in traced.sites:
        like = site.output if at == "output" else site.activation
        wanted = (*site.stack, *like.shape)
        if site.name in offsets and jnp.shape(offsets[site.name]) != wanted:
            raise StructureError(
                "offsets",
                got=f"shape {jnp.shape(offsets[site.name])} for {site.name!r}",
                expected=f"shape {wanted}: Site.stack, then the {at}'s",
                fix="Make it with jnp.zeros from the site.",
            )
