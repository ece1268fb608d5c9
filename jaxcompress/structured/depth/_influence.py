"""Scores of depth: block influence, and the change of a loss."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxcompress import tree
from jaxcompress.batches import open_stream
from jaxcompress.errors import ArgumentError, NonFiniteError
from jaxcompress.graph import Equation
from jaxcompress.graph.program import Cells, Position, run_program
from jaxcompress.structured.depth._blocks import Analysis, analyse
from jaxcompress.structured.depth._gated import run_gated
from jaxcompress.structured.depth._surgery import add_step, new_plan
from jaxcompress.structured.depth._units import (
    DepthUnit,
    Level,
    block_gates,
    by_unit,
    gate_shapes,
    split_layer,
    units_of,
)

Seen = tuple[Array, Array]
"""The sum of `1 - cos` over tokens, and the number of tokens."""


def influence(
    x: Float[ArrayLike, "*shape"], y: Float[ArrayLike, "*shape"], *, axis: int = -1
) -> Float[Array, ""]:
    """Measure how far a block turns its input: the mean over tokens of `1 - cos(x, y)`.

    Args:
        x: Its input, any shape.
        y: Its output.
        axis: The axis of features; the others are tokens.

    Returns:
        From 0 for none to 2 for the opposite. A token that is zero before and after counts 0, one
        that is zero on one side only 1.

    Example:
        >>> influence(jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([[3.0, 0.0], [0.0, 1.0]]))
        Array(0.5, dtype=float32)

    Reference:
        Men et al., ShortGPT, arXiv:2403.03853, equation 1.
    """
    total, count = _measure_turn(jnp.asarray(x), jnp.asarray(y), axis)
    return total / count


def _measure_turn(x: Array, y: Array, axis: int) -> Seen:
    x, y = (_unit(z.astype(jnp.float32), axis) for z in (x, y))
    cosine = jnp.sum(x * y, axis=axis)
    nothing = ~jnp.any((x != 0) | (y != 0), axis=axis)
    turned = jnp.where(nothing, 0.0, 1.0 - cosine)
    return jnp.sum(turned), jnp.asarray(turned.size, jnp.float32)


def _unit(x: Array, axis: int) -> Array:
    """Scale tokens to length 1; zeros stay."""
    for norm in (jnp.inf, 2):  # by the largest entry first, whose square may overflow
        size = jnp.linalg.norm(x, ord=norm, axis=axis, keepdims=True)
        x = x / jnp.where(size > 0, size, 1.0)
    return x


def block_influence(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    *,
    level: Level = "layer",
    axis: int = -1,
) -> dict[str, float]:
    r"""Score layers by how far they turn the residual stream, `1 - E[cos(x, y)]` over tokens.

    x is what goes into a layer and y what comes out of it, sums included: a layer of low influence
    can be dropped. One jitted pass over the batches, memory does not grow with their number.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure.
        params: Any pytree of arrays.
        batches: An iterable of input tuples for fn; a lone array counts as a one-tuple. Read once.
        level: "layer" for whole layers, the unit of the paper, or "block" for each branch.
        axis: The axis of features in x; the others are tokens.

    Returns:
        `{unit: influence}` from 0 to 2, `layers[i]` for layer i of a stack. `drop_layers` takes
        the names, but for single branches of one layer of a stack.

    Raises:
        ArgumentError: If fn has no residual blocks, or there are no batches.
        NonFiniteError: If an influence is NaN.

    Example:
        >>> fn = lambda params, x: (x := x + x @ params["a"]) + x @ params["b"]
        >>> params = {"a": jnp.eye(2), "b": jnp.array([[0.0, 1.0], [-1.0, 0.0]])}
        >>> scores = block_influence(fn, params, [jnp.ones((3, 2))])
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'a': 0.0, 'b': 0.293}

    Reference:
        Men et al., ShortGPT: Layers in large language models are more redundant than you expect,
        arXiv:2403.03853, equation 1.
    """
    units: list[DepthUnit] = []

    def see(params: tree.Params, batch: tuple[Any, ...]) -> dict[str, Seen]:
        analysis = analyse(fn, params, batch, {})
        units[:] = units_of(analysis, level)
        return _watch(analysis, (params, batch, {}), level, axis)

    step = jax.jit(see)
    totals: dict[str, list[np.ndarray]] = {}
    first, rest = open_stream(batches)
    for batch in itertools.chain([first], rest):
        for base, pair in step(params, batch).items():
            # Sums of a batch are added in float64: tokens are many.
            new = [np.asarray(z, np.float64) for z in pair]
            totals[base] = [a + b for a, b in zip(totals.get(base, (0, 0)), new, strict=True)]
    return check_scores(by_unit(units, {base: s / n for base, (s, n) in totals.items()}))


def check_scores(scores: Mapping[str, float]) -> dict[str, float]:
    wrong = [name for name, score in scores.items() if not math.isfinite(score)]
    if wrong:
        raise NonFiniteError(
            "scores",
            got=f"NaN or infinity at {tree.shorten(wrong)}",
            expected="finite scores",
            fix="Look for NaN in params and in the batches.",
        )
    return dict(scores)


def _watch(analysis: Analysis, args: Any, level: Level, axis: int) -> dict[str, Seen]:
    """Run fn, and give what was seen at each unit, `(length,)` for a stack."""
    keyed: dict[Position, list[tuple[str, str]]] = {}
    ends: dict[str, tuple[str, str]] = {}  # base -> its first and last block
    stacks = analysis.stacks if level == "layer" else {}
    for layer in analysis.layers.values():
        if layer.name in stacks:
            continue
        for base, blocks in split_layer(layer, level):
            first, last = ends[base] = blocks[0], blocks[-1]
            kinds = (("turn", first),) if first == last else (("in", first), ("out", last))
            for kind, block in kinds:
                keyed.setdefault(analysis.blocks[block].node.position, []).append((kind, base))
    at = {stack.node.position: [("layer", name)] for name, stack in stacks.items()}
    plan, visits = new_plan(fills=True, keyed=keyed | at)
    skips = {one.node.position: one.skip for one in analysis.blocks.values()}
    for position, cells in keyed.items():
        visits[position] = functools.partial(_see, cells, skips[position], axis)
    for name, stack in stacks.items():
        position, cell = stack.node.position, ("layer", name)
        step = functools.partial(_see_layer, cell, stack.carry, axis)
        visits[position] = add_step(plan, position, cell, step)
    found = run_program(analysis.traced.program, jax.tree.leaves(args), plan, {})[1]
    result: dict[str, Seen] = {name: found["layer", name] for name in stacks}
    for base, (first, last) in ends.items():
        seen = found.get(("turn", base))
        if first != last:
            seen = _measure_turn(found["in", base], found["out", base], axis)
        alone = base in analysis.blocks and (
            analysis.layers[analysis.layer_of(base)].length is not None
        )
        # Summed over the scans around a block but for that of its stack.
        sum_scans = lambda x, alone=alone: jnp.sum(x, axis=tuple(range(int(alone), x.ndim)))
        result[base] = jax.tree.map(sum_scans, seen)
    return result


def _see(
    seen_here: Sequence[tuple[str, str]],
    skip: int,
    axis: int,
    equation: Equation,
    operands: Sequence[Any],
    cells: Cells,
) -> tuple[list, Cells]:
    x, y = operands[skip], equation.bind(*operands)
    seen: Cells = {}
    for kind, base in seen_here:
        array = x if kind == "in" else y
        seen[kind, base] = _measure_turn(x, y, axis) if kind == "turn" else array
    return [y], seen


def _see_layer(
    cell: Any, carry: int, axis: int, before: Sequence[Any], after: Sequence[Any], value: Any
) -> tuple[Sequence[Any], Cells]:
    return after, {cell: _measure_turn(before[carry], after[carry], axis)}


def loss_change(
    fn: Callable[..., Any],
    params: tree.Params,
    batches: Iterable[Any],
    loss: Callable[..., ArrayLike],
    *,
    level: Level = "layer",
    inputs: int = 1,
) -> dict[str, float]:
    """Score each layer by how much the loss grows without it.

    `loss without the unit - loss`, by a single compiled function with a switch for each unit, at
    full size: it runs once for each unit and batch. Of a stack, the scan's carry passes by the
    layer that is left out.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure.
        params: Any pytree of arrays.
        batches: An iterable of tuples: fn's inputs, then what else the loss reads.
        loss: `loss(outputs, *batch)`, the whole batch: a mean, or one value per example.
        level: "layer" for whole layers, or "block" for each branch.
        inputs: How many entries of a batch are fn's inputs; the first ones.

    Returns:
        `{unit: change}`, as in `block_influence`. Negative: the loss is lower without.

    Raises:
        ArgumentError: If fn has no residual blocks, there are no batches, or `inputs` is more
            than a batch has.
        NonFiniteError: If a change is NaN.

    Example:
        >>> fn = lambda params, x: (x := x + x @ params["a"]) + x @ params["b"]
        >>> params = {"a": jnp.zeros((2, 2)), "b": jnp.eye(2)}
        >>> batch = (jnp.ones((3, 2)), 2 * jnp.ones((3, 2)))
        >>> loss_change(fn, params, [batch], lambda y, x, target: ((y - target) ** 2).mean(-1))
        {'a': 0.0, 'b': 1.0}

    Reference:
        Men et al., ShortGPT, arXiv:2403.03853, section 3.1 (perplexity without a layer).
    """
    units: list[DepthUnit] = []

    def value(params: tree.Params, off: Array, batch: tuple[Any, ...]) -> Array:
        analysis = analyse(fn, params, batch[:inputs], {})
        units[:] = units_of(analysis, level)
        outputs = _run_without(analysis, (params, batch[:inputs], {}), units, off, level)
        return jnp.mean(jnp.asarray(loss(outputs, *batch), jnp.float32))

    compiled = jax.jit(value)
    changes, total = np.zeros(0), 0
    first, rest = open_stream(batches)
    for batch in itertools.chain([first], rest):
        if not 1 <= inputs <= len(batch):
            raise ArgumentError(
                "inputs",
                got=str(inputs),
                expected=f"from 1 to {len(batch)}, the entries of a batch",
                fix="Batches are tuples: fn's inputs first, then targets.",
            )
        size = np.shape(jax.tree.leaves(batch)[0])[:1] or (1,)
        whole = np.float64(compiled(params, jnp.int32(-1), batch))
        without = [compiled(params, jnp.int32(k), batch) for k in range(len(units))]
        gap = np.asarray([np.float64(x) for x in without]) - whole
        changes = gap * size[0] + (changes if total else 0.0)
        total += size[0]
    return check_scores(
        {unit.name: float(x) for unit, x in zip(units, changes / total, strict=True)}
    )


def _run_without(
    analysis: Analysis, args: Any, units: list[DepthUnit], off: Array, level: Level
) -> Any:
    """Run fn without unit number `off`; -1 for none."""
    shapes = gate_shapes(analysis, level)
    on = jnp.arange(len(units)) != off
    gates, start = {}, 0
    for base, shape in shapes.items():
        count = math.prod(shape)
        gates[base] = on[start : start + count].reshape(shape)
        start += count
    if level == "block":
        return run_gated(analysis, args, block_gates(analysis, gates, level))
    stacks = {name: gates[name] for name in analysis.stacks}
    switches = {
        block: gate
        for block, gate in block_gates(analysis, gates, level).items()
        if analysis.layer_of(block) not in stacks
    }
    return run_gated(analysis, args, switches, layers=stacks)
