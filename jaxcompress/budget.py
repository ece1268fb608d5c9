"""Budgets: what may remain of a model, in a quantity that is named.

`Params(0.5)` leaves at most half of the parameters, `Flops(2_000_000)` at most two million
operations. Decisions that shrink a model step by step are cut off where the budget is first met.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxcompress.errors import ArgumentError


@dataclass(frozen=True)
class _Amount:
    """What may remain, as a fraction or a number.

    Attributes:
        amount: A fraction of what there is (a float of at most 1), or how much (an int, or a
            float above 1).
    """

    amount: float

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise ArgumentError(
                "amount",
                got=f"{type(self).__name__}({self.amount!r})",
                expected="a fraction in (0, 1] or a positive number",
                fix="Params(0.5) leaves at most half of the params.",
            )

    def limit(self, total: float) -> float:
        """Give the most that may remain.

        Args:
            total: What there is.

        Returns:
            The limit, in the unit of `total`.

        Example:
            >>> Params(0.5).limit(1000), Params(300).limit(1000)
            (500.0, 300)
        """
        return self.amount * total if self.is_fraction else self.amount

    @property
    def is_fraction(self) -> bool:
        """Whether the amount is a fraction of what there is."""
        return isinstance(self.amount, float) and self.amount <= 1


@dataclass(frozen=True)
class Params(_Amount):
    """At most so many entries of params.

    Attributes:
        amount: A fraction of what there is (a float of at most 1), or how many.
    """


@dataclass(frozen=True)
class Flops(_Amount):
    """At most so many operations of contractions in one call, 2 per multiply-add.

    Attributes:
        amount: A fraction of what there is (a float of at most 1), or how many.
    """


@dataclass(frozen=True)
class Bytes(_Amount):
    """At most so many bytes of params, as stored.

    Attributes:
        amount: A fraction of what there is (a float of at most 1), or how many.
    """


@dataclass(frozen=True)
class Seconds(_Amount):
    """At most so long a call, as the compiler of a target estimates it.

    A float is a fraction of the dense model's time if `relative`, else seconds.

    Attributes:
        amount: A fraction of the dense model's time, or seconds.
        target: What `graph.cost` takes, such as `"tpu-v5e"`.
        relative: Whether the amount is a fraction of the dense model's time.
    """

    target: str = "tpu-v5e"
    relative: bool = True

    @property
    def is_fraction(self) -> bool:
        """Whether the amount is a fraction of what there is."""
        return self.relative


Budget: TypeAlias = Params | Flops | Bytes | Seconds
"""Any of the budgets."""


def fewest_steps(cost: Callable[[int], float], steps: int, limit: float) -> int | None:
    """Find the fewest steps of shrinking after which a cost is within a limit.

    Args:
        cost: `steps taken -> cost`, not growing.
        steps: How many can be taken.
        limit: The most that may remain.

    Returns:
        The number of steps, by bisection; `None` if all of them are not enough.

    Example:
        >>> fewest_steps(lambda n: 100 - 7 * n, 10, 50)
        8
    """
    if cost(0) <= limit:
        return 0
    if cost(steps) > limit:
        return None
    low, high = 0, steps  # cost(low) > limit >= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    return high
