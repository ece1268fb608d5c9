"""Running a captured call with a gate on each branch or layer: `x + g f(x)`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.graph import Equation
from jaxcompress.graph.program import Cells
from jaxcompress.graph.sites import execute_plan
from jaxcompress.structured.depth._blocks import Analysis
from jaxcompress.structured.depth._surgery import add_step, new_plan


def run_gated(
    analysis: Analysis,
    args: Any,
    gates: Mapping[str, Any],
    *,
    layers: Mapping[str, Any] | None = None,
) -> Any:
    """Run fn at full size with gates.

    Args:
        analysis: The captured call.
        args: `(params, inputs, kwargs)`.
        gates: `{name of a block: gate}`, shaped as `Block.stack`. A boolean one switches the
            branch on or off, whatever it holds; another one multiplies it.
        layers: `{name of stacked layers: (length,) booleans}`: where false, what the scan
            carries passes the iteration by.

    Returns:
        fn's outputs.
    """
    layers = layers or {}
    blocks = {("block", name): analysis.blocks[name] for name in gates}
    stacks = {("layer", name): analysis.stacks[name] for name in layers}
    cells: Cells = {cell: gates[cell[1]] for cell in blocks}
    cells |= {cell: layers[cell[1]] for cell in stacks}
    keyed = {one.node.position: [cell] for cell, one in (blocks | stacks).items()}
    plan, visits = new_plan(keyed=keyed)
    for cell, block in blocks.items():
        visits[block.node.position] = functools.partial(_gate, cell, block.skip)
    for cell, stack in stacks.items():
        position = stack.node.position
        visits[position] = add_step(plan, position, cell, _choose_result)
    return execute_plan(analysis.traced, plan, args, cells)[0]


def _gate(
    cell: Any, skip: int, equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list, Cells]:
    """Add the gated branch; in the order of the operands, so that a gate of 1 changes nothing."""
    branch, gate = operands[1 - skip], cells[cell]
    if jnp.issubdtype(gate.dtype, jnp.bool_):
        gated = jnp.where(gate, branch, jnp.zeros_like(branch))
    else:
        gated = gate.astype(branch.dtype) * branch
    both = (operands[skip], gated) if skip == 0 else (gated, operands[skip])
    return [equation.bind(*both)], {}


def _choose_result(
    before: Sequence[Any], after: Sequence[Any], keep: Any
) -> tuple[list[Any], Cells]:
    return jax.tree.map(lambda x, y: jnp.where(keep, y, x), list(before), list(after)), {}
