"""`intercept`: handle sites with a state of their own, chosen once the sites are known."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxcompress import tree
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.sites._observe import check_states, named_sites, refuse_inside
from jaxcompress.graph.sites._replay import Equation, Plan, SitesAt, Visit, execute, make_plan
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import capture
from jaxcompress.graph.sites._walk import Position


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
UNREACHABLE = ("while condition", "custom_jvp", "custom_vjp")
"""Constructs (as `Site.scope` names them) at whose sites nothing can be intercepted."""


def intercept(fn: Callable[..., Any], decide: Decide) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Make a function that runs chosen sites through handlers with states: `replay` and `observe`.

    Gradients flow through what handlers do to operands and to states. Of an equation with
    several sites the handler of the first chosen one is called.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
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

    @functools.wraps(fn)
    def intercepted(params: tree.Params, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        traced = capture(fn, params, inputs, kwargs)
        chosen = decide(tuple(found.site for found in traced.record.sites))
        if not chosen:
            plan = Plan({}, {}, _never)
            return execute(traced, plan, (params, inputs, kwargs), {})[0], {}
        names = named_sites(traced, chosen, "decide")
        refuse_inside(traced, names, UNREACHABLE, "states and gradients do not reach inside")
        states = {name: chosen[name].state for name in names}
        check_states(traced, states, names)

        def match(program: Any, sites: SitesAt) -> dict[Position, Visit]:
            visits: dict[Position, Visit] = {}
            for position, found in sites.items():
                mine = next((s.name for s in found if s.name in chosen), None)
                if mine is not None:
                    visits[position] = functools.partial(_visit, mine, chosen[mine].handler)
            return visits

        plan = make_plan(traced.program, traced.record, traced.walker, match, fills=True)
        outputs, filled = execute(traced, plan, (params, inputs, kwargs), states)
        return outputs, {name: filled.get(name, states[name]) for name in names}

    return intercepted


def _visit(
    name: str,
    handler: Callable[..., Any],
    equation: Equation,
    operands: Sequence[Any],
    cells: Cells,
) -> tuple[list, Cells]:
    result, state = handler(equation, cells[name], *operands)
    results = list(result) if equation.primitive.multiple_results else [result]
    return results, {name: state}


def _never(position: Position, program: Any) -> Plan:
    raise AssertionError("a plan that visits nothing enters nothing")
