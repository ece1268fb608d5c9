"""What `dims` finds: the labels of every axis of every variable, and what is known of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxcompress.graph.dims._known import Facts
from jaxcompress.graph.dims._labels import Axis, Labels
from jaxcompress.graph.dims._rule import Axes
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._interpret import Position
from jaxcompress.graph.sites._trace import Traced


@dataclass(frozen=True, kw_only=True)
class Level:
    """A scan: the labels of its iterations.

    Attributes:
        axis: The labels.
        length: How many there are.
    """

    axis: Axis
    length: int


@dataclass(frozen=True, kw_only=True)
class Product:
    """A contraction as the labels of its axes; FLOPs are 2 x the product of their sizes.

    Attributes:
        position: The equation.
        axes: The axes of its result and those that it sums over.
        batch: How many of these, at the front, both operands share.
        summed: How many, at the end, it sums over.
        repeats: How often it runs.
        branch: The branch that it is in: `(position of the cond, number)` pairs.
        flops: What it takes at full size.
    """

    position: Position
    axes: Axes
    batch: int
    summed: int
    repeats: int
    branch: tuple[tuple[Position, int], ...]
    flops: int


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The labels of every axis of every variable; indices with one label go together.

    Attributes:
        traced: The captured call.
        labels: The store; `labels.rows(axis)` writes an axis as tuples of representatives.
        leaves: `{path: labels of its axes}`.
        programs: The program at each prefix of positions, and the labels of its variables.
        facts: What is known of their variables before fn runs.
        scans: The numbers of the scans around each, outermost first.
        reasons: For each label, why it may not be removed; empty if it may.
        layers: For each label, 1 + the number of the scan each of whose layers may keep another
            index; 0 if all layers keep the same.
        levels: The scans.
        products: All contractions.
        summed: Labels of axes along which two results are added: residual streams.
        carried: Labels of axes that a scan carries round.
        cuts: Parts of axes that are sliced off: as many of each go in every layer of a scan.
        dead: Positions of equations that nothing needs; they are left out.
        state: Which outputs mirror leaves of params: `{number of the output: path}`.
    """

    traced: Traced
    labels: Labels
    leaves: Mapping[str, Axes]
    programs: Mapping[Position, tuple[Program, Mapping[Any, Axes]]] = field(repr=False)
    facts: Mapping[Position, Facts] = field(repr=False)
    scans: Mapping[Position, tuple[int, ...]] = field(repr=False)
    reasons: np.ndarray = field(repr=False)
    layers: np.ndarray = field(repr=False)
    levels: tuple[Level, ...]
    products: tuple[Product, ...] = field(repr=False)
    summed: np.ndarray = field(repr=False)
    carried: np.ndarray = field(repr=False)
    cuts: tuple[Axis, ...] = field(repr=False)
    dead: frozenset[Position] = field(repr=False)
    state: Mapping[int, str]

    def layer_axis(self, axes: Axes, level: int) -> int | None:
        """Find the axis of a variable that counts the layers of a scan."""
        want = self.labels.find(self.levels[level].axis)
        for k, axis in enumerate(axes):
            if len(axis) > 1 and np.array_equal(self.labels.find(axis), want):
                return k
        return None
