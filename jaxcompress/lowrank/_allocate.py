"""Ranks under a budget: the least energy lost for what is saved, over all leaves together."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcompress import budget as budgets
from jaxcompress.errors import ArgumentError
from jaxcompress.lowrank._candidate import Rung


@dataclass(frozen=True)
class Reduction:
    """A leaf taken down a ladder.

    Attributes:
        path: The leaf.
        rung: The number of the rung that it is taken to.
        slope: The energy lost per unit saved.
    """

    path: str
    rung: int
    slope: float


def list_reductions(path: str, ladder: Sequence[Rung], quantity: str) -> list[Reduction]:
    """Find the rungs worth standing on, and what each step down to them loses per unit saved.

    These are the corners of the lower convex hull of loss over cost, so that slopes grow from
    step to step: taking all leaves' steps in the order of their slopes is then the best that can
    be had for each total it passes.

    Args:
        path: The leaf.
        ladder: Its rungs, the array itself first.
        quantity: "params" or "flops", what is saved.

    Returns:
        Its steps, in order.
    """
    cost = np.asarray([getattr(rung, quantity) for rung in ladder], np.float64)
    loss = np.asarray([rung.loss for rung in ladder], np.float64)
    corners, here = [], 0
    while True:
        below = np.flatnonzero(cost < cost[here])
        if not below.size:
            return corners
        slopes = (loss[below] - loss[here]) / (cost[here] - cost[below])
        # Of equal slopes the shortest step.
        least = slopes.min()
        near = below[slopes <= least + 1e-12 * max(abs(least), 1e-30)]
        there = int(near[np.argmax(cost[near])])
        corners.append(Reduction(path, there, float(least)))
        here = there


@dataclass
class Allocation:
    """Which rung each leaf stands on.

    Attributes:
        ladders: `{path: rungs}`, the array itself first.
        quantity: "params" or "flops".
        base: What everything else takes: the part that no rung changes.
    """

    ladders: Mapping[str, Sequence[Rung]]
    quantity: str
    base: float

    def __post_init__(self) -> None:
        steps = [
            list_reductions(path, ladder, self.quantity) for path, ladder in self.ladders.items()
        ]
        # A stable sort, so that ties go by path and rung.
        self.steps = sorted(itertools.chain(*steps), key=lambda step: step.slope)

    def after(self, count: int) -> dict[str, int]:
        """Give the rungs after so many steps."""
        state = dict.fromkeys(self.ladders, 0)
        for step in self.steps[:count]:
            state[step.path] = step.rung
        return state

    def cost(self, state: Mapping[str, int]) -> float:
        """Add up what is left."""
        return self.base + sum(
            getattr(self.ladders[path][k], self.quantity) for path, k in state.items()
        )

    def within(self, limit: float) -> dict[str, int] | None:
        """Find rungs within a limit, so that no leaf could stand on a higher one.

        Args:
            limit: The most that may remain.

        Returns:
            The rungs; `None` if the lowest of all are not within it.
        """
        count = budgets.fewest_steps(lambda n: self.cost(self.after(n)), len(self.steps), limit)
        return None if count is None else self._filled(self.after(count), limit)

    def _filled(self, state: dict[str, int], limit: float) -> dict[str, int]:
        """Give back what the last step saved too much, to the leaves that gain most by it."""
        read = lambda name: {
            path: np.asarray([getattr(rung, name) for rung in ladder], np.float64)
            for path, ladder in self.ladders.items()
        }
        costs, losses = read(self.quantity), read("loss")
        slack = limit - self.cost(state)
        while True:
            best: tuple[float, str, int] | None = None
            for path, k in state.items():
                more = costs[path] - costs[path][k]
                gain = losses[path][k] - losses[path]
                fits = (more > 0) & (more <= slack) & (gain >= 0)
                if fits.any():
                    rates = np.where(fits, gain / np.where(fits, more, 1), -1)
                    to = int(rates.argmax())
                    if best is None or rates[to] > best[0]:
                        best = float(rates[to]), path, to
            if best is None:
                return state
            _, path, to = best
            slack -= costs[path][to] - costs[path][state[path]]
            state[path] = to


def unreachable(budget: Any, limit: float, least: float, total: float, unit: str) -> Exception:
    """Say what the least is that can be reached."""
    return ArgumentError(
        "budget",
        got=f"{budget!r}, which is {limit:,.6g} of {total:,.6g} {unit}",
        expected=f"at least {least:,.6g} {unit} ({least / total:.4f} of all), what is left with "
        "every leaf at its lowest rank",
        fix="Raise the budget, or let `where` and `method` take more leaves.",
    )


def met_already(budget: Any, limit: float, total: float, unit: str) -> Exception:
    """Say that there is nothing to do."""
    return ArgumentError(
        "budget",
        got=f"{budget!r}, which {total:,.6g} {unit} meet as they are",
        expected=f"less than that: at most {limit:,.6g} may remain",
        fix="Params(0.5) leaves at most half of the params.",
    )
