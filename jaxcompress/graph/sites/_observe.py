"""`tap`, `observe` and `perturb`: values that leave or enter a function at its sites."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, SelectionError, StructureError
from jaxcompress.graph.program._constructs import Cells
from jaxcompress.graph.sites._replay import Equation, Plan, SitesAt, Visit, execute, make_plan
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, capture, no_sites
from jaxcompress.graph.sites._walk import Position

Observer: TypeAlias = Callable[[Site, Any, Any, Any], Any]
"""`(site, state, activation, output) -> state`, for one run of the site."""
Side: TypeAlias = Literal["input", "output"]


def tap(
    fn: Callable[..., Any], where: tree.Where, *, at: Side = "output"
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """Make a function that also returns activations at chosen sites.

    Feature distillation, relation losses and debugging need nothing else: the model stays as it
    is. Gradients flow through what is tapped, except inside functions with their own
    differentiation rule (`custom_jvp`, `custom_vjp`): these run a second time for the taps,
    callbacks included.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        where: Leaves whose sites are tapped; see `tree.matches`.
        at: "output" for the result of the contraction (before any bias), "input" for the
            activation that goes into it (the indices of a lookup).

    Returns:
        A function of the same arguments that returns `(outputs, activations)`, activations being
        `{Site.name: array}`. Inside scans they have `Site.stack` as leading axes; a `while` loop
        gives its last iteration, a branch not taken zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> outputs, taps = tap(fn, "*")(params, jnp.ones((5, 3)))
        >>> {name: x.shape for name, x in taps.items()}
        {'a': (5, 4), 'b': (5, 2)}
    """
    _check_side(at)

    def visit(equation: Equation, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        results = _default(equation, operands)
        return results, {
            site.name: results[0] if at == "output" else operands[site.layout.activation]
            for site in equation.sites
        }

    @functools.wraps(fn)
    def tapped(params: tree.Params, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
        traced = capture(fn, params, inputs, kwargs)
        names = chosen_sites(traced, where)
        refuse_inside(
            traced, names, ("while condition",), "nothing can leave the condition of a loop"
        )
        plan = _plan(traced, names, visit, fills=True)
        outputs, filled = execute(traced, plan, (params, inputs, kwargs), {})
        return outputs, {name: filled[name] for name in names}

    return tapped


def observe(
    fn: Callable[..., Any], observers: Mapping[str, Observer]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Make a function that updates a state at chosen sites as it runs: streaming statistics.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
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

    Example:
        >>> import jax.numpy as jnp
        >>> def largest(site, state, activation, output):
        ...     return jnp.maximum(state, jnp.abs(activation).max())
        >>> observed = observe(lambda p, x: x @ p["a"], {"a": largest})
        >>> params, x = {"a": jnp.ones((3, 4))}, jnp.array([[1.0, -5.0, 2.0]])
        >>> float(observed(params, {"a": jnp.zeros(())}, x)[1]["a"])
        5.0
    """

    def visit(equation: Equation, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        results, filled = _default(equation, operands), {}
        for site in equation.sites:
            if site.name in observers:
                activation, output = _observed(site, operands, results[0])
                state = observers[site.name](site, cells[site.name], activation, output)
                filled[site.name] = state
        return results, filled

    @functools.wraps(fn)
    def observed(
        params: tree.Params, states: Mapping[str, Any], *inputs: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        traced = capture(fn, params, inputs, kwargs)
        names = named_sites(traced, observers, "observers")
        refuse_inside(
            traced, names, ("while condition",), "nothing can leave the condition of a loop"
        )
        check_states(traced, states, names)
        plan = _plan(traced, names, visit, fills=True)
        outputs, filled = execute(traced, plan, (params, inputs, kwargs), dict(states))
        return outputs, {name: filled[name] for name in names}

    del observed.__wrapped__  # its signature is its own
    return observed


def perturb(
    fn: Callable[..., Any], where: tree.Where, *, at: Side = "output"
) -> Callable[..., Any]:
    """Make a function that adds offsets to activations at chosen sites.

    The gradient with respect to an offset is the gradient of the activation, which Fisher and
    Taylor criteria need.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        where: Leaves at whose sites offsets are added; see `tree.matches`.
        at: "output" for the result of the contraction, "input" for the activation that goes in.

    Returns:
        A function `(params, offsets, *inputs, **kwargs) -> outputs`, offsets being
        `{Site.name: array}` of shape `Site.stack + Site.output.shape` (or `Site.activation`'s).
        Sites that `offsets` leaves out get none.

    Raises:
        ArgumentError: When called, if a site lies inside a function with its own differentiation
            rule or in the condition of a loop, where gradients do not reach.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda p, x: (jnp.sin(x @ p["a"])).sum()
        >>> params, x = {"a": jnp.ones((3, 2))}, jnp.zeros((1, 3))
        >>> offsets = {"a": jnp.zeros((1, 2))}
        >>> jax.grad(perturb(fn, "a"), argnums=1)(params, offsets, x)["a"].tolist()
        [[1.0, 1.0]]
    """
    _check_side(at)

    def visit(equation: Equation, operands: Sequence[Any], cells: Cells) -> tuple[list, Cells]:
        operands = list(operands)
        for site in equation.sites:
            if at == "input" and site.name in cells:
                operands[site.layout.activation] += cells[site.name]
        results = _default(equation, operands)
        for site in equation.sites:
            if at == "output" and site.name in cells:
                results = [results[0] + cells[site.name]]
        return results, {}

    @functools.wraps(fn)
    def perturbed(
        params: tree.Params, offsets: Mapping[str, Any], *inputs: Any, **kwargs: Any
    ) -> Any:
        traced = capture(fn, params, inputs, kwargs)
        names = chosen_sites(traced, where)
        unknown = sorted(set(offsets) - set(names))
        if unknown:
            raise StructureError(
                "offsets",
                got=f"entries for {unknown}",
                expected=f"names of sites that `where` selects: {names[:8]}",
                fix="Use Site.name of `trace(fn, params, *inputs).sites`.",
            )
        unreachable = ("while condition", "custom_jvp", "custom_vjp")
        refuse_inside(traced, sorted(offsets), unreachable, "gradients do not reach inside")
        _check_offsets(traced, offsets, at)
        plan = _plan(traced, names, visit, fills=False)
        return execute(traced, plan, (params, inputs, kwargs), dict(offsets))[0]

    del perturbed.__wrapped__  # its signature is its own
    return perturbed


def _default(equation: Equation, operands: Sequence[Any]) -> list:
    result = equation.bind(*operands)
    return list(result) if equation.primitive.multiple_results else [result]


def _observed(site: Site, operands: Sequence[Any], result: Any) -> tuple[Any, Any]:
    layout = site.layout
    output = layout.observed_output
    return layout.observed(operands), result if output is None else output(operands, result)


def _plan(traced: Traced, names: Sequence[str], visit: Visit, *, fills: bool) -> Plan:
    wanted = set(names)

    def match(program: Any, sites: SitesAt) -> dict[Position, Visit]:
        return {p: visit for p, found in sites.items() if any(s.name in wanted for s in found)}

    return make_plan(traced.program, traced.record, traced.walker, match, fills=fills)


def chosen_sites(traced: Traced, where: tree.Where) -> list[str]:
    """List the names of the sites of the leaves that `where` selects."""
    sites = [site for _, site, _ in traced.record.sites]
    names = [s.name for s in sites if tree.matches(where, s.path, traced.leaves[s.path])]
    if not names:
        known = list(dict.fromkeys(site.path for site in sites))
        raise SelectionError(
            "where",
            got=f"{where!r}, which selects no leaf that fn contracts or looks up",
            expected="a `where` that selects at least one site",
            fix=f"The leaves with sites are: {tree.shorten(known)}."
            if known
            else no_sites(traced.record),
        )
    return names


def named_sites(traced: Traced, names: Mapping[str, Any], argument: str) -> list[str]:
    known = [site.name for _, site, _ in traced.record.sites]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SelectionError(
            argument,
            got=f"{tree.shorten(unknown)}, which fn has no site of" if unknown else "none",
            expected="names of sites",
            fix=f"The sites are: {tree.shorten(known)}.",
        )
    return [name for name in known if name in names]


def refuse_inside(traced: Traced, names: Sequence[str], labels: Sequence[str], why: str) -> None:
    for _, site, _ in traced.record.sites:
        inside = [label for label in site.scope if label in labels]
        if site.name in names and inside:
            raise ArgumentError(
                "where",
                got=f"the site {site.name!r} inside {inside[0]}: {why}",
                expected="sites whose values can be reached",
                fix="Leave it out, with `tree.without`.",
            )


def check_states(traced: Traced, states: Mapping[str, Any], names: Sequence[str]) -> None:
    fix = "Make one state per observer, with Site.stack as leading axes of its arrays."
    if set(states) != set(names):
        raise StructureError(
            "states",
            got=f"entries for {sorted(states)}",
            expected=f"one entry for each of {list(names)}",
            fix=fix,
        )
    for _, site, _ in traced.record.sites:
        for leaf in jax.tree.leaves(states.get(site.name)):
            shape = jnp.shape(leaf)
            if shape[: len(site.stack)] != site.stack:
                raise StructureError(
                    "states",
                    got=f"an array of shape {shape} for {site.name!r}",
                    expected=f"leading axes {site.stack}",
                    fix=fix,
                )


def _check_offsets(traced: Traced, offsets: Mapping[str, Any], at: Side) -> None:
    for _, site, _ in traced.record.sites:
        like = site.output if at == "output" else site.activation
        wanted = (*site.stack, *like.shape)
        if site.name in offsets and jnp.shape(offsets[site.name]) != wanted:
            raise StructureError(
                "offsets",
                got=f"shape {jnp.shape(offsets[site.name])} for {site.name!r}",
                expected=f"shape {wanted}: Site.stack, then the {at}'s",
                fix="Make it with jnp.zeros from the site.",
            )


def _check_side(at: Any) -> None:
    if at not in ("input", "output"):
        raise ArgumentError(
            "at", got=repr(at), expected='"input" or "output"', fix="Choose one of the two."
        )
