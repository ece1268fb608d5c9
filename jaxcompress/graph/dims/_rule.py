"""Rules of `dims`: one per primitive, registered by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from jaxcompress.graph.dims._labels import Axis, Labels
from jaxcompress.graph.program._rules import Rules
from jaxcompress.graph.sites._sites import elements

Axes: TypeAlias = tuple[Axis, ...]
"""The labels along each axis of one variable."""


def concrete(shape: Sequence[Any]) -> tuple[int, ...]:
    """Give a shape as integers; a symbolic dimension counts as 1."""
    return tuple(elements([n]) for n in shape)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One equation, as a rule sees it.

    Attributes:
        eqn: The JAX equation.
        operands: The labels of its operands.
        known: Their values, where they are small integers that depend on nothing; else `None`.
        labels: The store.
        uniform: Says of labels that they stand for one index in all layers of a scan.
        cut: Says of labels that they are a part of an axis, which is counted by itself.
        by_layer: Whether what is made here may be another in each layer of a scan.
    """

    eqn: Any
    operands: tuple[Axes, ...]
    known: tuple[np.ndarray | None, ...]
    labels: Labels
    uniform: Callable[[Axis], None]
    cut: Callable[[Axis], None]
    by_layer: bool

    @property
    def params(self) -> Mapping[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    def shape(self, result: int = 0) -> tuple[int, ...]:
        """The shape of a result, a symbolic dimension counted as 1."""
        return concrete(self.eqn.outvars[result].aval.shape)

    def fresh(self, *, frozen: str | None = None, uniform: bool = True) -> list[Axes]:
        """Make new labels for all results.

        Args:
            frozen: Why they may not be removed.
            uniform: Whether they stand for one index in all layers of a scan.

        Returns:
            The labels.
        """
        results = []
        for var in self.eqn.outvars:
            shape = concrete(getattr(var.aval, "shape", ()))
            axes = tuple(self.labels.fresh(n, frozen=frozen) for n in shape)
            for axis in axes if uniform else ():
                self.uniform(axis)
            results.append(axes)
        return results


class DimsRule(Protocol):
    """What `dims` knows of a primitive.

    An optional method `resize(eqn, operands, kept)` runs the equation on smaller operands, where
    the same parameters would not do; see `Kept`. A class attribute `neutral` gives the number that
    changes nothing when a result is reduced over it; 0 without. `by_layer` says that `resize` takes
    what differs between layers by `Kept.take`, so that `follow` may leave it so.
    """

    def follow(self, step: Step) -> list[Axes]:
        """Give the labels of the results."""
        ...


_RULES: Rules[DimsRule] = Rules(lambda kind: kind())


def register_dims(*primitives: str) -> Callable[[type], type]:
    """Say how the indices of a primitive's results are those of its operands.

    Args:
        *primitives: Names of primitives.

    Returns:
        A decorator for a class with the methods of `DimsRule`.
    """
    return _RULES.register(*primitives)


def dims_rule(primitive: str) -> DimsRule | None:
    return _RULES.get(primitive)
