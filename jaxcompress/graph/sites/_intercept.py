"""`intercept`: handle sites with a state of their own, chosen once the sites are known.

What is done at a site is a stack of layers around its equation; `tap`, `observe` and `perturb` are
layers, too, so that one run of a captured call can do all of it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxcompress import tree
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._run import Equation, Plan, Visit
from jaxcompress.graph.sites._replay import SitesAt, execute_plan, make_plan
from jaxcompress.graph.sites._select import CONDITION, check_states, find_named, refuse_inside
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, call_of, wraps

Go: TypeAlias = Callable[[list[Any], Cells], tuple[list[Any], Cells]]
"""`(operands, cells) -> (results, filled cells)`: the equation, with the layers inside."""
Around: TypeAlias = Callable[[Equation, Site, Go, list[Any], Cells], tuple[list[Any], Cells]]
"""`(equation, site, go, operands, cells) -> (results, filled cells)`."""


class SiteLayer(NamedTuple):
    """What is done around the equation of a site.

    Attributes:
        around: What is done; it calls `go`, or does something else instead.
        reads: The names of the cells that it reads.
    """

    around: Around
    reads: tuple[str, ...] = ()


UNREACHABLE = (*CONDITION, "custom_jvp", "custom_vjp")
"""Constructs (as `Site.scope` names them) at whose sites nothing can be intercepted."""


def run_layers(
    traced: Traced,
    args: Any,
    layers: Mapping[str, Sequence[SiteLayer]],
    cells: Cells,
    *,
    fills: bool,
) -> tuple[Any, Cells]:
    """Run a captured call with layers around its sites.

    Args:
        traced: The call.
        args: `(params, inputs, kwargs)`.
        layers: `{Site.name: layers}`, the innermost first.
        cells: The cells that layers read, with the lengths of the scans around as leading axes.
        fills: Whether layers fill cells.

    Returns:
        fn's outputs and the cells that were filled.
    """
    return execute_plan(traced, plan_layers(traced, layers, fills=fills), args, cells)


def plan_layers(traced: Traced, layers: Mapping[str, Sequence[SiteLayer]], *, fills: bool) -> Plan:
    """Plan a run of a captured call with layers around its sites; see `run_layers`."""

    def match(program: Any, sites: SitesAt) -> dict[Position, Visit]:
        visit = functools.partial(visit_layers, layers)
        return {p: visit for p, found in sites.items() if any(s.name in layers for s in found)}

    reads = {name: [cell for one in mine for cell in one.reads] for name, mine in layers.items()}
    return make_plan(traced, match, fills=fills, reads=reads)


def visit_layers(
    layers: Mapping[str, Sequence[SiteLayer]],
    equation: Equation,
    operands: Sequence[Any],
    cells: Cells,
) -> tuple[list[Any], Cells]:
    """Run an equation with the layers around its sites; gives results and filled cells."""

    def bind(operands: list[Any], cells: Cells) -> tuple[list[Any], Cells]:
        result = equation.bind(*operands)
        return (list(result) if equation.primitive.multiple_results else [result]), {}

    go: Go = bind
    for site in equation.sites:
        for layer in layers.get(site.name, ()):
            go = functools.partial(layer.around, equation, site, go)
    return go(list(operands), cells)


class Interception(NamedTuple):
    """What is done at one site.

    Attributes:
        handler: `(equation, state, *operands) -> (result, state)`, for one run of the site; the
            state it returns has the structure, shapes and dtypes of the one it got.
        state: Any pytree of arrays, `Site.stack` as leading axes: one entry per iteration of the
            enclosing scans.
    """

    handler: Callable[..., tuple[Any, Any]]
    state: Any = ()


Decide: TypeAlias = Callable[[tuple[Site, ...]], Mapping[str, Interception]]
"""`sites -> {Site.name: what is done there}`; the sites in the order in which fn runs them."""


def intercept(
    fn: Callable[..., Any] | Traced, decide: Decide
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Make a function that runs chosen sites by handlers with states: `replay` plus `observe`.

    Gradients flow through what handlers do to operands and to states. Of an equation with
    several sites the handler of the first chosen one is called.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or what `capture` made of it.
        decide: Called once per call with fn's sites, chooses some of them. What states hold may
            be traced already, by `grad` say.

    Returns:
        A function of the same arguments that returns `(outputs, states)`, states being
        `{Site.name: state after the call}`. A `while` loop carries a state through all
        iterations; a branch not taken leaves it as it is.

    Raises:
        SelectionError: When called, if a chosen name is no site.
        StructureError: When called, if a state lacks the leading axes.
        ArgumentError: When called, if a chosen site lies in a function with its own
            differentiation rule or in the condition of a loop.

    Example:
        >>> import jax.numpy as jnp
        >>> def halve(equation, count, x, w):
        ...     return equation.bind(x / 2, w), count + 1
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> halved = intercept(fn, lambda sites: {"b": Interception(halve, jnp.zeros((), int))})
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> outputs, states = halved(params, jnp.ones((5, 3)))
        >>> bool(jnp.allclose(outputs, fn(params, jnp.ones((5, 3))) / 2)), int(states["b"])
        (True, 1)
    """

    @wraps(fn)
    def intercepted(params: tree.Params, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        traced, args = call_of(fn, params, inputs, kwargs), (params, inputs, kwargs)
        chosen = decide(traced.sites)
        if not chosen:
            return run_layers(traced, args, {}, {}, fills=False)
        names = find_named(traced, chosen, "decide")
        refuse_inside(traced, names, UNREACHABLE, "states and gradients do not reach inside")
        states = {name: chosen[name].state for name in names}
        check_states(traced, states, names)
        first: dict[Position, str] = {}
        for found in traced.record.sites:
            if found.site.name in names:
                first.setdefault(found.position, found.site.name)
        layers = {name: [_make_handler_layer(chosen[name].handler)] for name in first.values()}
        outputs, filled = run_layers(traced, args, layers, states, fills=True)
        return outputs, {name: filled.get(name, states[name]) for name in names}

    return intercepted


def _make_handler_layer(handler: Callable[..., tuple[Any, Any]]) -> SiteLayer:
    """Make a layer that a handler takes the place of the equation in."""

    def around(
        equation: Equation, site: Site, go: Go, operands: list[Any], cells: Cells
    ) -> tuple[list[Any], Cells]:
        result, state = handler(equation, cells[site.name], *operands)
        return list(result) if equation.primitive.multiple_results else [result], {site.name: state}

    return SiteLayer(around)
