"""Units of depth: blocks or layers, each alone in a stack, with the gates that switch them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from jaxcompress.errors import ArgumentError, require_one_of
from jaxcompress.structured.depth._blocks import Analysis, Layer

Level: TypeAlias = Literal["layer", "block"]


@dataclass(frozen=True, kw_only=True)
class DepthUnit:
    """What is scored as one.

    Attributes:
        name: `layers_0`, `layers[0]`, `layers_0/attention`, `layers/attention[0]`.
        base: The name without the index.
        index: Which one of a stack; `None` elsewhere.
        blocks: Names of its blocks.
    """

    name: str
    base: str
    index: int | None
    blocks: tuple[str, ...]


def units_of(analysis: Analysis, level: Level) -> list[DepthUnit]:
    """List the units of a function, in the order in which they run.

    Raises:
        ArgumentError: If there are none, or the level is neither.
    """
    check_level(level)
    if not analysis.blocks:
        raise ArgumentError(
            "fn",
            got="a function without residual blocks",
            expected="sums x + f(x) with a contraction of params in f",
            fix="See structured.blocks(fn, params, *inputs).rejected for what is no block and why.",
        )
    found = []
    for layer in analysis.layers.values():
        for base, blocks in split_layer(layer, level):
            if layer.length is None:
                found.append(DepthUnit(name=base, base=base, index=None, blocks=blocks))
            for i in range(layer.length or 0):
                found.append(DepthUnit(name=f"{base}[{i}]", base=base, index=i, blocks=blocks))
    return found


def split_layer(layer: Layer, level: Level) -> list[tuple[str, tuple[str, ...]]]:
    """Split a layer into what is scored as one: base names, each with its blocks."""
    if level == "layer":
        return [(layer.name, layer.blocks)]
    return [(block, (block,)) for block in layer.blocks]


def check_level(level: str) -> None:
    fix = 'Choose level="layer" for whole layers, "block" for each residual branch.'
    require_one_of("level", level, ("layer", "block"), fix=fix)


def by_unit(units: list[DepthUnit], values: Mapping[str, Any]) -> dict[str, float]:
    """Read a number per unit from arrays by base name, `(length,)` for a stack."""
    found = {}
    for unit in units:
        value = values[unit.base]
        found[unit.name] = float(value if unit.index is None else value[unit.index])
    return found


def spread_gate(gate: Any, stack: tuple[int, ...]) -> Any:
    """Repeat a gate, `()` or `(length,)`, over the scans around a block."""
    gate = jnp.reshape(gate, gate.shape + (1,) * (len(stack) - gate.ndim))
    return jnp.broadcast_to(gate, stack)


def block_gates(analysis: Analysis, gates: Mapping[str, Any], level: Level) -> dict[str, Any]:
    """Give each block the gate of its unit."""
    found = {}
    for layer in analysis.layers.values():
        for base, blocks in split_layer(layer, level):
            for block in blocks:
                found[block] = spread_gate(gates[base], analysis.blocks[block].stack)
    return found


def gate_shapes(analysis: Analysis, level: Level) -> dict[str, tuple[int, ...]]:
    """Give the shape of each gate: one number for each unit."""
    shapes = {}
    for layer in analysis.layers.values():
        shape = () if layer.length is None else (layer.length,)
        shapes |= {base: shape for base, _ in split_layer(layer, level)}
    return shapes
