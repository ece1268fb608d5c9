"""What XLA counts once that runs many times: the bodies of loops.

`cost_analysis` (and the TPU compiler's `optimal_seconds`) counts the body of a `while` loop once,
however often it runs, so that a model with scanned layers would seem to have one. The body's own
cost is found by difference: the same program is compiled again with the scan unrolled once more,
and the body is then added as often as it runs. With T the figure of the program as it is, in which
a scan of n steps inside scans that run m times has c copies of its body, and T' with c' copies,

    body = (T' - T) / (c' - c)        figure = T + sum over scans of m (n - c) body

Nested scans follow: an outer body's difference holds the inner body once.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.extend.core import jaxpr_as_fun


class Loop(NamedTuple):
    """Scans that are unrolled together: they count alike.

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


def further(length: int, unroll: int) -> int:
    """Choose the next unrolling that has more copies, without a remainder if there is one.

    Args:
        length: Steps.
        unroll: Steps per iteration now.

    Returns:
        Steps per iteration, more than `unroll`.
    """
    even = [u for u in range(unroll + 1, length // 2 + 1) if length % u == 0]
    return min(even, default=min(2 * unroll, length))


def loops(jaxpr: Any) -> tuple[Loop, ...]:
    """List the scans in a jaxpr of which the compiler will count too few steps.

    Args:
        jaxpr: An open or closed jaxpr.

    Returns:
        Their kinds, each once; a scan without steps or already unrolled is none.
    """
    found = {
        loop: None for loop in _walk(jaxpr, 1, 0) if copies(loop.length, loop.unroll) < loop.length
    }
    return tuple(found)


def _walk(jaxpr: Any, outer: int, depth: int) -> Iterator[Loop]:
    for eqn in jaxpr.eqns:
        inside, deeper = outer, depth
        if eqn.primitive.name == "scan":
            loop = _loop(eqn, outer, depth)
            yield loop
            inside, deeper = outer * loop.length, depth + 1
        for value in eqn.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                if _is_jaxpr(one):
                    yield from _walk(one, inside, deeper)


def _loop(eqn: Any, outer: int, depth: int) -> Loop:
    length = eqn.params["length"]
    unroll = eqn.params["unroll"]
    unroll = length if unroll is True else max(int(unroll), 1)
    return Loop(length, unroll, outer, depth)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") and hasattr(value, "replace")


def unrolled(jaxpr: Any, loop: Loop) -> Callable[..., Any]:
    """Make the function of a closed jaxpr with some of its scans unrolled further.

    Args:
        jaxpr: A closed jaxpr.
        loop: Which of them.

    Returns:
        A function of the flattened arguments.
    """
    return jaxpr_as_fun(_rewrite(jaxpr, loop, 1, 0))


def _rewrite(jaxpr: Any, loop: Loop, outer: int, depth: int) -> Any:
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.replace(jaxpr=_rewrite(jaxpr.jaxpr, loop, outer, depth))
    return jaxpr.replace(eqns=[_rewrite_eqn(eqn, loop, outer, depth) for eqn in jaxpr.eqns])


def _rewrite_eqn(eqn: Any, loop: Loop, outer: int, depth: int) -> Any:
    changed = {}
    inside, deeper = outer, depth
    if eqn.primitive.name == "scan":
        own = _loop(eqn, outer, depth)
        inside, deeper = outer * own.length, depth + 1
        if own == loop:
            changed["unroll"] = further(own.length, own.unroll)

    def enter(value: Any) -> Any:
        if isinstance(value, tuple | list) and any(map(_is_jaxpr, value)):
            return type(value)(map(enter, value))
        return _rewrite(value, loop, inside, deeper) if _is_jaxpr(value) else value

    for key, value in eqn.params.items():
        entered = enter(value)
        if entered is not value:
            changed[key] = entered
    return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def multiplied(
    figures: Mapping[str, float], variants: Mapping[Loop, Mapping[str, float]]
) -> dict[str, float]:
    """Count every loop body as often as it runs.

    Args:
        figures: The compiler's figures for the program as it is.
        variants: Its figures for each program with one kind of loop unrolled further.

    Returns:
        Figures of the whole; those for which a body came out negative are missing.
    """
    totals = {}
    for key, value in figures.items():
        total = value
        for loop, others in variants.items():
            now = copies(loop.length, loop.unroll)
            more = copies(loop.length, further(loop.length, loop.unroll)) - now
            body = (others.get(key, float("nan")) - value) / more
            # A compiler that optimises the copies jointly may come out a trifle lower.
            total += loop.outer * (loop.length - now) * body if body >= 0 else float("nan")
        if total == total:
            totals[key] = total
    return totals
