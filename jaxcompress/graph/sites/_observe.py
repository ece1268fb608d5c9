"""`observe`: a state for each of chosen sites, updated as the function runs."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxcompress import tree
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.program._run import Equation
from jaxcompress.graph.sites._intercept import Go, SiteLayer, run_layers
from jaxcompress.graph.sites._select import CONDITION, check_states, find_named, refuse_inside
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, call_of

Observer: TypeAlias = Callable[[Site, Any, Any, Any], Any]
"""`(site, state, activation, output) -> state`, for one run of the site."""


def observe(
    fn: Callable[..., Any] | Traced, observers: Mapping[str, Observer]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Make a function that updates a state at chosen sites as it runs: streaming statistics.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or what `capture` made of it.
        observers: `{Site.name: observer}`; `observer(site, state, activation, output)` returns
            the state after one run of the site. For `jax.lax.ragged_dot` activation and output are
            `(experts, tokens, ...)`, zero where a token belongs to another expert.

    Returns:
        A function `(params, states, *inputs, **kwargs) -> (outputs, states)`, states being
        `{Site.name: pytree}`. States have `Site.stack` as leading axes, one entry per iteration
        of the enclosing scans; a `while` loop carries its state through all iterations; a branch
        not taken leaves its states as they are.

    Raises:
        SelectionError: When called, if a name is no site.
        StructureError: When called, if a state is missing.
        ArgumentError: When called, if a site lies in the condition of a loop.

    Example:
        >>> import jax.numpy as jnp
        >>> def largest(site, state, activation, output):
        ...     return jnp.maximum(state, jnp.abs(activation).max())
        >>> observed = observe(lambda p, x: x @ p["a"], {"a": largest})
        >>> params, x = {"a": jnp.ones((3, 4))}, jnp.array([[1.0, -5.0, 2.0]])
        >>> float(observed(params, {"a": jnp.zeros(())}, x)[1]["a"])
        5.0
    """

    def observed(
        params: tree.Params, states: Mapping[str, Any], *inputs: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        traced = call_of(fn, params, inputs, kwargs)
        names = check_observers(traced, observers, states)
        layers = {name: [make_observe_layer(observers[name])] for name in names}
        args = params, inputs, kwargs
        outputs, filled = run_layers(traced, args, layers, dict(states), fills=True)
        return outputs, {name: filled[name] for name in names}

    return observed


def check_observers(
    traced: Traced, observers: Mapping[str, Observer], states: Mapping[str, Any]
) -> list[str]:
    """Check that observers are at sites and have states; lists their names in fn's order."""
    names = find_named(traced, observers, "observers")
    refuse_inside(traced, names, CONDITION, "nothing can leave the condition of a loop")
    check_states(traced, states, names)
    return names


def make_observe_layer(observer: Observer) -> SiteLayer:
    """Make a layer that updates the cell of its site."""

    def around(
        equation: Equation, site: Site, go: Go, operands: list[Any], cells: Cells
    ) -> tuple[list[Any], Cells]:
        results, filled = go(operands, cells)
        layout, activation, output = site.layout, operands[site.layout.activation], results[0]
        if layout.observed is not None:
            activation = layout.observed(operands)
        if layout.observed_output is not None:
            output = layout.observed_output(operands, output)
        state = observer(site, cells[site.name], activation, output)
        return results, {**filled, site.name: state}

    return SiteLayer(around)
