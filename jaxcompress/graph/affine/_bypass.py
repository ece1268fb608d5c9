"""`bypass`: fn without the affine functions that follow chosen sites, but for one added leaf."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.affine._affine import chains_of
from jaxcompress.graph.affine._chain import Chain
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.program._live import Live, equation_steps, live, variables
from jaxcompress.graph.program._run import Visit, leave_out, pass_on
from jaxcompress.graph.sites._replay import SitesAt, execute_plan, make_plan
from jaxcompress.graph.sites._trace import Traced, call_of, wraps


def bypass(fn: Callable[..., Any] | Traced, names: Iterable[str]) -> Callable[..., Any]:
    """Make a function in which the chains of chosen sites only add one leaf: `y -> y + leaf`.

    It is fn replayed, so it works wherever fn does. What only served the equations that are left
    out is left out, too. It takes the leaves that `Chain.folded` gives.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or what `capture` made of it.
        names: Names of sites whose chains have `unfoldable` of `None`; see `affine`.

    Returns:
        A function of the same arguments.

    Raises:
        ArgumentError: When called, if the chain of a site cannot be left out, or is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda params, x: (x @ params["w"]) * params["scale"] + params["bias"]
        >>> params = {"w": jnp.ones((3, 2)), "scale": jnp.zeros(2), "bias": jnp.ones(2)}
        >>> fn(params, jnp.ones(3)).tolist(), bypass(fn, ["w"])(params, jnp.ones(3)).tolist()
        ([1.0, 1.0], [4.0, 4.0])
    """
    wanted = tuple(names)

    @wraps(fn)
    def bypassed(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        traced = call_of(fn, params, inputs, kwargs)
        chains = chains_of(traced)
        chosen = [_require_foldable(name, chains.get(name)) for name in wanted]
        visits = _visits(traced.program, chosen)

        def match(program: Program, sites: SitesAt) -> dict[Position, Visit]:
            # Rules of differentiation hold no chain, so only fn's own program is asked for.
            return visits

        plan = make_plan(traced, match)
        return execute_plan(traced, plan, (params, inputs, kwargs), {})[0]

    return bypassed


def _require_foldable(name: str, chain: Chain | None) -> Chain:
    why = "fn has no such contraction" if chain is None else chain.unfoldable
    if chain is None or why is not None:
        raise ArgumentError(
            "names",
            got=f"{name!r}: {why}",
            expected="sites whose chain can be folded in every call, with these inputs too",
            fix="Take the names from `affine`, for inputs like those of this call.",
        )
    return chain


def _visits(program: Program, chains: Sequence[Chain]) -> dict[Position, Visit]:
    """Choose what to do at equations that are left out, and at those that served only them."""
    visits: dict[Position, Visit] = {}
    bodies: dict[Position, Program] = {(): program}
    kept: dict[Position, dict[int, int]] = {(): {}}
    for chain in chains:
        for position, operand in chain.skipped:
            prefix, number = position[:-1], position[-1]
            visits[position] = functools.partial(pass_on, operand)
            bodies[prefix] = chain.body(prefix)
            kept.setdefault(prefix, {})[number] = operand
    for prefix, body in bodies.items():
        for number in _idle(body, kept[prefix]):
            visits[*prefix, number] = leave_out
    return visits


def _idle(program: Program, kept: dict[int, int]) -> set[int]:
    """List equations that nothing needs once those in `kept` read one operand only."""
    steps, results = equation_steps(program), variables(program.outvars)

    def reads(number: int, found: Live) -> list[Any]:
        invars = program.eqns[number].invars
        return variables([invars[kept[number]]] if number in kept else invars)

    needed = set(live(steps, results, reads).numbers)
    return set(live(steps, results).numbers) - needed
