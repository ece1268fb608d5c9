"""What XLA counts once that runs many times: the bodies of loops.

`cost_analysis` (and the TPU compiler's `optimal_seconds`) counts the body of a `while` loop once,
however often it runs, so that a model with scanned layers would seem to have one. A body's own
cost is found by difference: the program is compiled again with three steps in the place of a scan,
and with two. With T the figure of the program as it is, in which a scan of n steps inside scans
that run m times has c copies of its body, and T3 and T2 the figures with steps for scans,

    figure = T + sum over scans of m (n - c) (T3 - T2)

Nested scans follow: an outer body's difference holds the inner body once. What the first step
alone pays (copies of what is carried) is in T already, and in both T2 and T3. Unrolling the scan
instead would not do: it changes how the compiler slices and fuses stacked weights.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from jaxcompress.graph.program import _compat


class Loop(NamedTuple):
    """Scans that get a step more together: they count alike.

    Attributes:
        length: Steps of each.
        unroll: The unrolling that they were written with.
        outer: How often each is entered: the product of the lengths around it.
        depth: How many scans enclose it.
    """

    length: int
    unroll: int
    outer: int
    depth: int


def copies(length: int, unroll: int) -> int:
    """Count the copies of its body that a scan is compiled to: its loop's, and the remainder's.

    Args:
        length: Steps.
        unroll: Steps per iteration of the loop.

    Returns:
        Copies.

    Example:
        >>> copies(32, 1), copies(32, 2), copies(7, 2), copies(2, 2)
        (1, 2, 3, 2)
    """
    if length // max(unroll, 1) <= 1:
        return length if unroll != 1 else min(length, 1)
    return unroll + length % unroll


def loops(jaxpr: Any) -> tuple[Loop, ...]:
    """List the scans in a jaxpr of which the compiler will count too few steps.

    Args:
        jaxpr: An open or closed jaxpr.

    Returns:
        Their kinds, each once; a scan without steps or already unrolled is none.
    """
    found = {
        loop: None
        for loop in _walk_loops(jaxpr, 1, 0)
        if copies(loop.length, loop.unroll) < loop.length
    }
    return tuple(found)


def _walk_loops(jaxpr: Any, outer: int, depth: int) -> Iterator[Loop]:
    for eqn in jaxpr.eqns:
        inside, deeper = outer, depth
        if eqn.primitive.name == "scan":
            loop = _loop(eqn, outer, depth)
            yield loop
            inside, deeper = outer * loop.length, depth + 1
        for one in _compat.subjaxprs(eqn):
            yield from _walk_loops(one, inside, deeper)


def _loop(eqn: Any, outer: int, depth: int) -> Loop:
    length = eqn.params["length"]
    unroll = eqn.params["unroll"]
    unroll = length if unroll is True else max(int(unroll), 1)
    return Loop(length, unroll, outer, depth)


def run_steps(jaxpr: Any, loop: Loop, steps: int) -> Callable[..., Any]:
    """Make the function of a closed jaxpr with some of its scans replaced by a few of their steps.

    Args:
        jaxpr: A closed jaxpr.
        loop: Which of them.
        steps: How many steps.

    Returns:
        A function of the flattened arguments; it computes something else.
    """
    return jaxpr_as_fun(_rewrite(jaxpr, loop, steps, 1, 0))


def _rewrite(jaxpr: Any, loop: Loop, steps: int, outer: int, depth: int) -> Any:
    def change(eqn: Any) -> Any:
        inside, deeper = outer, depth
        if eqn.primitive.name == "scan":
            own = _loop(eqn, outer, depth)
            if own == loop:
                return _unroll_steps(eqn, steps)
            inside, deeper = outer * own.length, depth + 1
        return _compat.map_subjaxprs(eqn, lambda one: _rewrite(one, loop, steps, inside, deeper))

    return _compat.map_equations(jaxpr, change)


def _unroll_steps(eqn: Any, count: int) -> Any:
    """Make an equation that runs the first steps of a scan, one after the other."""
    num_consts, num_carry = _compat.scan_counts(eqn)
    step, opaque = jaxpr_as_fun(eqn.params["jaxpr"]), jax.lax.optimization_barrier

    def run(*operands: Any) -> list[Any]:
        consts, rest = operands[:num_consts], operands[num_consts:]
        carry, xs = list(rest[:num_carry]), rest[num_carry:]
        stacked = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[num_carry:]]
        for k in range(count):
            # Opaque, or the compiler would simplify a step at a known index, or fuse two.
            carry, index = opaque((carry, k))
            slices = [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in xs]
            results = step(*consts, *carry, *slices)
            carry, ys = list(results[:num_carry]), results[num_carry:]
            stacked = [
                jax.lax.dynamic_update_index_in_dim(all_ys, y, index, 0)
                for all_ys, y in zip(stacked, ys, strict=True)
            ]
        return [*carry, *stacked]

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    traced = jax.make_jaxpr(jax.jit(run))(*avals)
    (call,) = traced.eqns
    return call.replace(invars=eqn.invars, outvars=eqn.outvars, effects=eqn.effects)


def multiply_loops(
    figures: Mapping[str, float], bodies: Mapping[Loop, Mapping[str, float]]
) -> dict[str, float]:
    """Count every loop body as often as it runs.

    Args:
        figures: The compiler's figures for the program as it is.
        bodies: The figures of one step of each kind of loop.

    Returns:
        Figures of the whole; those for which a body is unknown or came out negative are missing.
    """
    totals = {}
    for key, value in figures.items():
        total = value
        for loop, body in bodies.items():
            one = body.get(key, -1.0)
            missing = loop.outer * (loop.length - copies(loop.length, loop.unroll))
            total += missing * one if one >= 0 else float("nan")
        if total == total:
            totals[key] = total
    return totals
