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
    cells: Cells = {f"block {name}": gate for name, gate in gates.items()}
    cells |= {f"layer {name}": gate for name, gate in layers.items()}
    labels = {analysis.blocks[name].node.position: frozenset({f"block {name}"}) for name in gates}
    labels |= {analysis.stacks[name].node.position: frozenset({f"layer {name}"}) for name in layers}
    plan, visits = new_plan(labels=labels)
    for name in gates:
        one = analysis.blocks[name]
        visits[one.node.position] = functools.partial(_gate, f"block {name}", one.skip)
    for name in layers:
        position = analysis.stacks[name].node.position
        visits[position] = add_step(plan, position, f"layer {name}", _choose_result)
    return execute_plan(analysis.traced, plan, args, cells)[0]


def _gate(
    label: str, skip: int, equation: Equation, operands: Sequence[Any], cells: Cells
) -> tuple[list, Cells]:
    """Add the gated branch; in the order of the operands, so that a gate of 1 changes nothing."""
    branch, gate = operands[1 - skip], cells[label]
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
