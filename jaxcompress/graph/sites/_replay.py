"""`replay`: run a function's jaxpr with chosen equations handled by the caller."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, SelectionError
from jaxcompress.graph.program._compat import Primitive, Program
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.program._interpret import Position, equations
from jaxcompress.graph.program._run import NOTHING, Carrier, Equation, Plan, Visit, run_program
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, call_of, suggest_sites, wraps
from jaxcompress.graph.sites._walk import FoundSite

Handler: TypeAlias = Callable[..., Any]
"""`(equation, *operands) -> result`, or a list of results for a primitive that has several."""
Key: TypeAlias = Any
"""A `where` over leaf paths (glob or regex), a JAX primitive, or `(Equation) -> bool`."""


def execute_plan(traced: Traced, plan: Plan, args: Any, cells: Cells) -> tuple[Any, Cells]:
    """Run a captured call under a plan; returns fn's outputs and the filled cells.

    With a carrier, a node among the arguments is the argument for the array it stands for.
    """
    is_leaf = None if plan.carrier is None else tree.is_leaf
    results, filled = run_program(
        traced.program, jax.tree.leaves(args, is_leaf=is_leaf), plan, cells
    )
    results = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in results]
    return jax.tree.unflatten(jax.tree.structure(traced.outputs), results), filled


def call(traced: Traced, params: tree.Params, inputs: Any, kwargs: Any) -> Any:
    """Run a captured call on other arguments of the same types; returns fn's outputs."""
    return execute_plan(traced, NOTHING, (params, inputs, kwargs), {})[0]


SitesAt: TypeAlias = Mapping[Position, tuple[Site, ...]]
Match: TypeAlias = Callable[[Program, SitesAt], Mapping[Position, Visit]]
"""Chooses what to visit in a program, given the sites in it."""


def make_plan(
    traced: Traced,
    match: Match,
    *,
    fills: bool = False,
    carrier: Carrier | None = None,
    reads: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """Choose the equations to visit, here and in forward programs that come to light later.

    Args:
        traced: The captured call.
        match: Chooses them.
        fills: Whether visits fill cells.
        carrier: What takes nodes through the program.
        reads: `{Site.name: names of cells}` that visits read beside those named as their sites.

    Returns:
        The plan.
    """
    record = traced.record
    sites: dict[Position, tuple[Site, ...]] = {}
    for position, site, _ in record.sites:
        sites[position] = (*sites.get(position, ()), site)

    def forward(position: Position, later: Program) -> Plan:
        operands = traced.walk.operands(position)
        found, walk = traced.domain.walk(later, operands[len(operands) - len(later.invars) :])
        known = [f.site for f in record.sites if f.position[: len(position)] == position]
        found.sites = _same_sites(found.sites, known)
        later_call = replace(traced, program=later, record=found, walk=walk)
        return make_plan(later_call, match, fills=fills, carrier=carrier, reads=reads)

    visits = match(traced.program, sites)
    known = reads or {}
    keyed = {
        position: tuple(cell for site in sites[position] for cell in known.get(site.name, ()))
        for position in visits
        if known and position in sites
    }
    return Plan(visits, sites, forward, fills, carrier, keyed=keyed)


def _same_sites(found: list[FoundSite], known: list[Site]) -> list[FoundSite]:
    """Give the sites of a forward program the names and places they have in the primal one."""
    left = list(known)
    named = []
    for number, one in enumerate(found):
        alike = [s for s in left if _describe_site(s) == _describe_site(one.site)]
        if alike:
            left.remove(alike[0])
            places = ("name", "stack", "layers", "scope", "repeats", "upstream", "beside")
            changes = {place: getattr(alike[0], place) for place in places}
        else:  # the rule's forward program contracts more, or otherwise
            changes = {"name": f"{one.site.path}#forward{number}"}
        named.append(one._replace(site=replace(one.site, **changes)))
    return named


def _describe_site(site: Site) -> tuple[Any, ...]:
    return site.path, site.primitive, site.axes, site.weight.shape, site.activation.shape


class _Matcher:
    """Finds the first pair that takes each equation, and notes which pairs took any."""

    def __init__(
        self, pairs: Sequence[tuple[Key, Handler]], leaves: Mapping[str, Any], taken: set[int]
    ):
        self._pairs, self._leaves, self._taken = pairs, leaves, taken
        self._looks_everywhere = any(_is_general(key) for key, _ in pairs)

    def __call__(self, program: Program, sites: SitesAt) -> dict[Position, Visit]:
        visits: dict[Position, Visit] = {}
        for here, eqn in equations(program):
            inside = any(here[:k] in visits for k in range(1, len(here), 2))
            if inside or not (here in sites or self._looks_everywhere):
                continue
            equation = Equation(eqn.primitive, eqn.params, sites.get(here, ()), eqn)
            for k, (key, handler) in enumerate(self._pairs):
                if self._takes(key, equation):
                    visits[here] = functools.partial(_call, handler)
                    self._taken.add(k)
                    break
        return visits

    def _takes(self, key: Key, equation: Equation) -> bool:
        if isinstance(key, Primitive):
            return equation.primitive is key
        if _is_general(key):
            return bool(key(equation))
        return any(tree.matches(key, s.path, self._leaves[s.path]) for s in equation.sites)


def _is_general(key: Key) -> bool:
    """Tell whether a key can take equations that are no sites: a predicate of one argument."""
    if not callable(key):
        return isinstance(key, Primitive)
    return len(inspect.signature(key).parameters) == 1


def _call(
    handler: Handler, equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list, Cells]:
    several = equation.primitive.multiple_results
    result = handler(equation, *operands)
    results = list(result) if several and isinstance(result, Sequence) else [result]
    count = len(equation.eqn.outvars)
    if len(results) != count or any(isinstance(x, tuple | list | None) for x in results):
        at = ", ".join(site.name for site in equation.sites) or equation.primitive.name
        raise ArgumentError(
            "handlers",
            got=f"{type(result).__name__} from the handler at {at}",
            expected=f"a list of {count} results" if several else "the one result, an array",
            fix="Return what equation.bind(*operands) returns.",
        )
    return results, {}


def _explain_nothing_taken(key: Key, traced: Traced) -> Exception:
    return SelectionError(
        "handlers",
        got=f"the key {key!r}, which takes no equation of fn (or only such as an earlier key has)",
        expected="keys that each take at least one equation",
        fix=suggest_sites(traced),
    )


def replay(
    fn: Callable[..., Any] | Traced, handlers: Mapping[Key, Handler] | Sequence[tuple[Key, Handler]]
) -> Callable[..., Any]:
    """Make a function that runs like `fn`, with chosen equations handled by you.

    `fn` is traced when the new function is called, so it works wherever fn does: under `jit`,
    `grad`, `vmap`, `scan`, `remat` and shardings. Constructs that hold a handled equation are
    rebuilt around it with all their parameters; the others are bound whole. A jitted function
    that fn calls several times is rebuilt for each call, as handlers may treat its sites apart.
    With handlers that do what the equation does, values and gradients are fn's own, bit for bit
    under jit.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or what `capture` made of it.
        handlers: `{key: handler}`, or pairs where a key cannot be hashed. A key is a `where`
            over the paths of leaves (glob, compiled regex, `(path, leaf) -> bool`, or several),
            which takes equations that contract such a leaf or look it up; a JAX primitive
            (`jax.lax.dot_general_p`), which takes all its equations; or a predicate of one
            argument, `(Equation) -> bool`. The first key that
            takes an equation counts. A handler gets the `Equation` and its operands and returns
            the result, or a list of results if the primitive has several;
            `equation.bind(*operands)` does what the equation does.

    Returns:
        A function of the same arguments.

    Raises:
        ArgumentTypeError: If a key or a handler is none.
        SelectionError: When called, if some key takes no equation.
        ArgumentError: When called, if a handler does not return what the primitive has: one
            array, or a list of as many.

    Example:
        >>> import jax.numpy as jnp
        >>> def double(equation, x, w):
        ...     return equation.bind(x, 2 * w)
        >>> fn = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> doubled = replay(fn, {"kernel": double})
        >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> bool((doubled(params, x) == jnp.tanh(2 * x @ params["kernel"])).all())
        True
    """
    pairs = list(handlers.items()) if isinstance(handlers, Mapping) else list(handlers)
    for key, handler in pairs:
        _check_pair(key, handler)

    @wraps(fn)
    def replayed(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        traced = call_of(fn, params, inputs, kwargs)
        taken: set[int] = set()
        plan = make_plan(traced, _Matcher(pairs, traced.leaves, taken))
        for k, (key, _) in enumerate(pairs):
            if k not in taken:
                raise _explain_nothing_taken(key, traced)
        results, _ = execute_plan(traced, plan, (params, inputs, kwargs), {})
        return results

    return replayed


def _check_pair(key: Key, handler: Handler) -> None:
    kinds = str | Primitive | Sequence
    if not isinstance(key, kinds) and not hasattr(key, "search") and not callable(key):
        raise ArgumentTypeError(
            "handlers",
            got=f"the key {key!r}",
            expected="a path glob, a compiled regex, a JAX primitive or a predicate",
            fix='For example {"**/kernel": handler} or {jax.lax.dot_general_p: handler}.',
        )
    if not callable(handler):
        raise ArgumentTypeError(
            "handlers",
            got=f"{handler!r} for {key!r}",
            expected="a function (equation, *operands) -> result",
            fix="Pass a function.",
        )
