"""What is needed for chosen results: one backward pass over the steps of a program."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxcompress.graph.program import _compat


class LiveStep(NamedTuple):
    """A step of a program, as the pass sees it.

    Attributes:
        operands: What it reads.
        results: What it makes.
        lasts: Whether it runs though nothing reads its results: it has effects.
    """

    operands: Iterable[Hashable]
    results: Iterable[Hashable]
    lasts: bool = False


class Live(NamedTuple):
    """What is needed.

    Attributes:
        numbers: The steps, in order.
        last: What is read, each with the number of the last step that does; the number of all
            steps for what is wanted in the end.
    """

    numbers: list[int]
    last: dict[Any, int]


def live(
    steps: Sequence[LiveStep],
    wanted: Iterable[Hashable],
    reads: Callable[[int, Live], Iterable[Hashable]] | None = None,
) -> Live:
    """Find the steps that some results, or effects, depend on.

    Args:
        steps: The steps, in order.
        wanted: The results.
        reads: `(number of a step, what is known to be needed so far) -> what it reads`, for steps
            that do not read all their operands; asked from the last needed step to the first.

    Returns:
        What is needed.
    """
    found = Live([], dict.fromkeys(wanted, len(steps)))
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        if step.lasts or any(result in found.last for result in step.results):
            for value in step.operands if reads is None else reads(number, found):
                found.last.setdefault(value, number)
            found.numbers.append(number)
    found.numbers.reverse()
    return found


def variables(atoms: Iterable[Any]) -> list[Any]:
    """List those atoms that are variables, no literals."""
    return [atom for atom in atoms if not isinstance(atom, _compat.Literal)]


def equation_steps(program: _compat.Program) -> list[LiveStep]:
    """Describe the equations of a program as steps on its variables."""
    return [LiveStep(variables(e.invars), e.outvars, bool(e.effects)) for e in program.eqns]
