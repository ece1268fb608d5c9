"""Learning-rate schedules as small frozen configs; each builds an optax schedule.

A schedule gives the learning rate as a fraction of its peak, so that the peak stands in one place
(`OptimizerConfig.learning_rate`). Lengths are in optimizer steps.
"""

from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp
import optax
import optax.contrib

from jaxcompress.errors import ArgumentError


def _require(argument: str, holds: bool, *, got: object, expected: str) -> None:
    if not holds:
        raise ArgumentError(argument, got=got, expected=expected, fix="Change the schedule.")


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak rate throughout."""

    def build(self) -> optax.Schedule:
        """Make the optax schedule.

        Returns:
            `step -> 1`.
        """
        return optax.constant_schedule(1.0)


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """Step decay: multiply the rate by a factor at each boundary.

    Attributes:
        boundaries: The steps from which on the rate is lower, increasing.
        factor: What the rate is multiplied by there, in (0, 1].
    """

    boundaries: tuple[int, ...]
    factor: float = 0.1

    def __post_init__(self):
        ordered = all(a < b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False))
        positive = bool(self.boundaries) and self.boundaries[0] > 0
        _require(
            "boundaries",
            ordered and positive,
            got=self.boundaries,
            expected="at least one step, all positive and increasing",
        )
        _require("factor", 0 < self.factor <= 1, got=self.factor, expected="a factor in (0, 1]")

    def build(self) -> optax.Schedule:
        """Make the optax schedule.

        Returns:
            `step -> factor ** (number of boundaries reached)`.
        """
        scales = dict.fromkeys(self.boundaries, self.factor)
        return optax.piecewise_constant_schedule(1.0, scales)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Exponential decay, `rate ** (step / every)`.

    Attributes:
        every: Steps over which the rate falls by one factor.
        rate: That factor, in (0, 1].
        staircase: Decay at multiples of `every` only.
    """

    every: int
    rate: float = 0.9
    staircase: bool = False

    def __post_init__(self):
        _require("every", self.every > 0, got=self.every, expected="a positive number of steps")
        _require("rate", 0 < self.rate <= 1, got=self.rate, expected="a rate in (0, 1]")

    def build(self) -> optax.Schedule:
        """Make the optax schedule.

        Returns:
            `step -> rate ** (step / every)`.
        """
        return optax.exponential_decay(1.0, self.every, self.rate, staircase=self.staircase)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from the peak to `final`, which then holds.

    Attributes:
        steps: The length of the decay.
        final: The fraction of the peak at its end, in [0, 1].
    """

    steps: int
    final: float = 0.0

    def __post_init__(self):
        _require("steps", self.steps > 0, got=self.steps, expected="a positive number of steps")
        _require("final", 0 <= self.final <= 1, got=self.final, expected="a fraction in [0, 1]")

    def build(self) -> optax.Schedule:
        """Make the optax schedule.

        Returns:
            `step -> 1 + (final - 1) * min(step / steps, 1)`.
        """
        return optax.linear_schedule(1.0, self.final, self.steps)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to `final`, which then holds (arXiv:1608.03983, eq. 5).

    Attributes:
        steps: The length of the decay.
        final: The fraction of the peak at its end, in [0, 1].
    """

    steps: int
    final: float = 0.0

    def __post_init__(self):
        _require("steps", self.steps > 0, got=self.steps, expected="a positive number of steps")
        _require("final", 0 <= self.final <= 1, got=self.final, expected="a fraction in [0, 1]")

    def build(self) -> optax.Schedule:
        """Make the optax schedule.

        Returns:
            `step -> final + (1 - final) * (1 + cos(pi * min(step / steps, 1))) / 2`.
        """
        return optax.cosine_decay_schedule(1.0, self.steps, self.final)


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Lower the rate when the training loss stops falling (`optax.contrib.reduce_on_plateau`).

    The loss comes from `make_step`, which hands it to the optimizer as `value`.

    Attributes:
        factor: What the rate is multiplied by, in (0, 1).
        patience: Means without improvement before the rate falls.
        steps: Steps whose losses make one mean. One batch is noisy: an epoch is a good choice.
        cooldown: Means to wait after a reduction.
        tolerance: The relative improvement that counts as one, in (0, 1].
        final: The lowest fraction of the peak.
    """

    factor: float = 0.1
    patience: int = 10
    steps: int = 1
    cooldown: int = 0
    tolerance: float = 1e-4
    final: float = 0.0

    def __post_init__(self):
        _require("factor", 0 < self.factor < 1, got=self.factor, expected="a factor in (0, 1)")
        _require("patience", self.patience > 0, got=self.patience, expected="at least 1")
        _require("steps", self.steps > 0, got=self.steps, expected="a positive number of steps")
        _require("cooldown", self.cooldown >= 0, got=self.cooldown, expected="0 or more")
        _require(
            "tolerance", 0 < self.tolerance <= 1, got=self.tolerance, expected="a value in (0, 1]"
        )
        _require("final", 0 <= self.final <= 1, got=self.final, expected="a fraction in [0, 1]")

    def build(self) -> optax.Schedule:
        """Make the optax schedule of the step alone; the reductions come from `transformation`.

        Returns:
            `step -> 1`.
        """
        return optax.constant_schedule(1.0)

    def transformation(self, *, warmup: int = 0) -> optax.GradientTransformationExtraArgs:
        """Make the optax transformation that goes last in the chain.

        Args:
            warmup: Updates during which it only waits: while the rate rises, the loss may well
                stand still.

        Returns:
            A transformation whose update takes the loss as `value`.
        """
        plateau = optax.contrib.reduce_on_plateau(
            factor=self.factor,
            patience=self.patience,
            rtol=self.tolerance,
            cooldown=self.cooldown,
            accumulation_size=self.steps,
            min_scale=self.final,
        )
        if not warmup:
            return plateau
        return optax.conditionally_transform(plateau, lambda step, **_: jnp.asarray(step) >= warmup)


Schedule: TypeAlias = Constant | Staircase | Exponential | Linear | Cosine | Plateau
"""Any of the schedules."""


def learning_rate(peak: float, schedule: Schedule, *, warmup: int = 0) -> optax.Schedule:
    """Scale a schedule to its peak, after a linear warm-up from 0.

    Args:
        peak: The highest learning rate.
        schedule: What follows the warm-up; its step 0 is the warm-up's end.
        warmup: The warm-up's length in steps.

    Returns:
        `step -> learning rate`.

    Raises:
        ArgumentError: If `warmup` is negative.

    Example:
        >>> rate = learning_rate(0.1, Linear(steps=10), warmup=5)
        >>> [round(float(rate(step)), 3) for step in (0, 1, 5, 10, 15)]
        [0.0, 0.02, 0.1, 0.05, 0.0]
    """
    _require("warmup", warmup >= 0, got=warmup, expected="0 or more steps")
    fraction = schedule.build()
    if warmup:
        rise = optax.linear_schedule(0.0, 1.0, warmup)
        fraction = optax.join_schedules([rise, fraction], [warmup])
    return lambda step: peak * fraction(step)
