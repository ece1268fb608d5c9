"""`tap`: activations at chosen sites, returned beside a function's outputs."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from jaxcompress import tree
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.program._run import Equation
from jaxcompress.graph.sites._intercept import Go, SiteLayer, run_layers
from jaxcompress.graph.sites._select import CONDITION, Side, check_side, choose_sites, refuse_inside
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, call_of, wraps


def tap(
    fn: Callable[..., Any] | Traced, where: tree.Where, *, at: Side = "output"
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Make a function that also returns activations at chosen sites.

    Feature distillation, relation losses and debugging need nothing else: the model stays as it
    is. Gradients flow through what is tapped, except inside functions with their own
    differentiation rule (`custom_jvp`, `custom_vjp`): these run a second time for the taps,
    callbacks included.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or what `capture` made of it.
        where: Leaves whose sites are tapped; see `tree.matches`.
        at: "output" for the result of the contraction (before any bias), "input" for the
            activation that goes into it (the indices of a lookup).

    Returns:
        A function of the same arguments that returns `(outputs, activations)`, activations being
        `{Site.name: array}`. Inside scans they have `Site.stack` as leading axes; a `while` loop
        gives its last iteration, a branch not taken zeros.

    Raises:
        ArgumentError: If `at` is neither; when called, if a site lies in the condition of a loop.
        SelectionError: When called, if `where` selects no site.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> outputs, taps = tap(fn, "*")(params, jnp.ones((5, 3)))
        >>> {name: x.shape for name, x in taps.items()}
        {'a': (5, 4), 'b': (5, 2)}
    """
    check_side(at)

    @wraps(fn)
    def tapped(params: tree.Params, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
        traced = call_of(fn, params, inputs, kwargs)
        names = choose_sites(traced, where)
        refuse_inside(traced, names, CONDITION, "nothing can leave the condition of a loop")
        layers = {name: [make_tap_layer(at, name)] for name in names}
        return run_layers(traced, (params, inputs, kwargs), layers, {}, fills=True)

    return tapped


def make_tap_layer(at: Side, cell: str) -> SiteLayer:
    """Make a layer that fills a cell with one of a site's arrays."""

    def around(
        equation: Equation, site: Site, go: Go, operands: list[Any], cells: Cells
    ) -> tuple[list[Any], Cells]:
        results, filled = go(operands, cells)
        tapped = results[0] if at == "output" else operands[site.layout.activation]
        return results, {**filled, cell: tapped}

    return SiteLayer(around)
