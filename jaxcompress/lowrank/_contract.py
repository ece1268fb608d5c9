"""Contractions by factors: one thin contraction per part, in the order that costs less.

Every function here returns the result, or in words why the array is needed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress import tree
from jaxcompress.graph.leaves import place_result
from jaxcompress.lowrank._factors import CarriedFactors

Program: TypeAlias = Callable[..., Array]
"""`(*operands) -> result`, one operand a `CarriedFactors`."""


@dataclass(frozen=True)
class Stage:
    """One part on its way into a contraction.

    Attributes:
        array: `(*axes of the array at hand, incoming rank, outgoing rank)`, 1 where it has none.
        axes: The axes that it holds: those along which it varies.
    """

    array: Array
    axes: frozenset[int]


def contract(equation: Any, operands: Sequence[Any], operand: int) -> Array | str:
    """Run an equation by factors.

    Args:
        equation: A `graph.Equation`.
        operands: Its operands, one of them a node.
        operand: Which one.

    Returns:
        The result; in words why the array is needed, if it is.
    """
    rule = _RULES.get(equation.primitive.name)
    node = operands[operand]
    if rule is None:
        return f"{equation.primitive.name} takes arrays"
    if not tree.is_floating(operands[1 - min(operand, 1)]):
        return "the activation is no floating-point array"
    if _are_merged(node):
        return "what the factors tell apart is merged to one axis"
    if operands[1 - min(operand, 1)].dtype != node.dtype:
        wide = equation.result_dtype
        operands = [
            x.cast(wide) if x is node else x.astype(wide) if tree.is_floating(x) else x
            for x in operands
        ]
        node = operands[operand]
    program = rule(equation, operands, operand, node)
    if isinstance(program, str):
        return program
    result = place_result(program, equation, operands)(*operands)
    return result.astype(equation.result_dtype)


def _are_merged(node: CarriedFactors) -> bool:
    """Tell whether an axis of the array at hand merges several that a part tells apart."""
    for part in node.parts:
        for stored in node.stored_axes:
            mine = [part.shape[k] for k in stored]
            if math.prod(mine) > 1 and mine != [node.lengths[k] for k in stored]:
                return True
    return False


def _list_stages(node: CarriedFactors) -> list[Stage]:
    """Give the parts in the axes of the array at hand."""
    stages = []
    for number, part in enumerate(node.parts):
        lengths = [math.prod(part.shape[k] for k in stored) for stored in node.stored_axes]
        own = part.shape[len(node.lengths) :]
        first, last = number == 0, number == len(node.parts) - 1
        ranks = (1, *own) if first else (*own, 1) if last else own
        held = frozenset(axis for axis, length in enumerate(lengths) if length > 1)
        stages.append(Stage(part.reshape(*lengths, *ranks), held))
    return stages


def _transpose_stages(stages: Sequence[Stage]) -> list[Stage]:
    return [Stage(jnp.swapaxes(s.array, -1, -2), s.axes) for s in reversed(stages)]


# --- dot_general ---------------------------------------------------------------------------------


def _plan_dot(
    equation: Any, operands: Sequence[Any], operand: int, node: CarriedFactors
) -> Program | str:
    (contracts, batches) = equation.params["dimension_numbers"]
    other = 1 - operand
    w_rank, x_rank = node.ndim, operands[other].ndim
    # A label for each axis: those of the weight 0, 1, ..., the others after them.
    x_labels = [w_rank + k for k in range(x_rank)]
    for axes in (contracts, batches):
        for w_axis, x_axis in zip(axes[operand], axes[other], strict=True):
            x_labels[x_axis] = w_axis
    free_w = [k for k in range(w_rank) if k not in (*contracts[operand], *batches[operand])]
    free_x = [k for k in x_labels if k >= w_rank]
    first, second = (free_w, free_x) if operand == 0 else (free_x, free_w)
    out = [*batches[operand], *first, *second]

    def run(x: Array, node: CarriedFactors, *, flip: bool, tally: list[int]) -> Array:
        stages = _list_stages(node)
        chain = _transpose_stages(stages) if flip else stages
        return _einsums(equation, x, x_labels, chain, out, tally)

    costs = {flip: _count_flops(run, operands[other], node, flip=flip) for flip in (False, True)}
    flip = costs[True] < costs[False]
    sizes = dict(enumerate(node.shape)) | dict(zip(x_labels, operands[other].shape, strict=True))
    dense = 2 * math.prod(sizes.values()) + _count_densifying(node)
    if costs[flip] >= dense:
        return "multiplying its factors out costs less here"

    def program(*operands: Any) -> Array:
        return run(operands[other], operands[operand], flip=flip, tally=[])

    return program


def _einsums(
    equation: Any,
    x: Array,
    labels: Sequence[int],
    chain: Sequence[Stage],
    out: Sequence[int],
    tally: list[int],
) -> Array:
    """Contract x with one part after the other; an axis is summed with the last that holds it."""
    w_rank = chain[0].array.ndim - 2
    rank = max((*labels, w_rank)) + 1  # labels of ranks come after all others
    free = set(range(w_rank)) - {k for stage in chain for k in stage.axes}
    dtype = x.dtype
    for number, stage in enumerate(chain):
        held = sorted(stage.axes | (free if number == 0 else set()))
        first, last = number == 0, number == len(chain) - 1
        ranks = [rank + number - 1] * (not first) + [rank + number] * (not last)
        own = stage.array.shape[w_rank + first : w_rank + 2 - last]
        part = stage.array.reshape([*(stage.array.shape[k] for k in held), *own])
        later = {k for after in chain[number + 1 :] for k in after.axes}
        mine = [*held, *ranks]
        kept = [k for k in dict.fromkeys((*labels, *mine)) if k in out or k in later]
        kept += [rank + number] * (not last)
        kept = list(out) if last else kept
        sizes = dict(zip(labels, x.shape, strict=True)) | dict(zip(mine, part.shape, strict=True))
        tally.append(2 * math.prod(sizes.values()))
        x = jnp.einsum(
            x,
            list(labels),
            part,
            mine,
            kept,
            precision=equation.params["precision"],
            preferred_element_type=equation.result_dtype if last else dtype,
        )
        labels = kept
    return x


def _count_flops(run: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs that a run writes down; nothing is computed."""
    tally: list[int] = []
    jax.eval_shape(functools.partial(run, tally=tally, **kwargs), *args)
    return sum(tally)


def _count_densifying(node: CarriedFactors) -> int:
    """FLOPs of multiplying the parts out."""
    ranks = [part.shape[-1] for part in node.parts[:-1]]
    return 2 * node.size * min(ranks)


# --- conv_general_dilated ------------------------------------------------------------------------


def _plan_conv(
    equation: Any, operands: Sequence[Any], operand: int, node: CarriedFactors
) -> Program | str:
    params = equation.params
    if operand != 1 or params["batch_group_count"] != 1 or params["feature_group_count"] != 1:
        return "the convolution has feature groups, or is one by an activation"
    out, inside = params["dimension_numbers"].rhs_spec[:2]
    holders = _list_holders(node)
    if any(len(parts) > 1 for parts in holders):
        return "its convolutions are told apart by an axis of the kernel"
    last = len(node.parts) - 1
    ends = [next(iter(holders[k]), None) for k in (inside, out)]
    if all(end in (None, want) for end, want in zip(ends, (0, last), strict=True)):
        flip = False
    elif all(end in (None, want) for end, want in zip(ends, (last, 0), strict=True)):
        flip = True
    else:
        return "one of its factors holds input and output channels"

    def run(x: Array, node: CarriedFactors, *, tally: list[int]) -> Array:
        stages = _list_stages(node)
        return _convs(equation, x, _transpose_stages(stages) if flip else stages, tally)

    kernel = jax.ShapeDtypeStruct(node.shape, node.dtype)
    result = jax.eval_shape(equation.bind, operands[0], kernel)
    dense = 2 * math.prod(result.shape) * node.size // node.shape[out]
    if _count_flops(run, operands[0], node) >= dense + _count_densifying(node):
        return "multiplying its factors out costs less here"
    return lambda x, node: run(x, node, tally=[])


def _list_holders(node: CarriedFactors) -> list[set[int]]:
    """List for each axis of the array at hand the parts that vary along it."""
    return [
        {number for number, part in enumerate(node.parts) if any(part.shape[k] > 1 for k in stored)}
        for stored in node.stored_axes
    ]


def _convs(equation: Any, x: Array, chain: Sequence[Stage], tally: list[int]) -> Array:
    """Convolve with one part after the other; a window's stride and padding go with its part."""
    params = equation.params
    out, inside, *spatial = params["dimension_numbers"].rhs_spec
    owner = [next((i for i, s in enumerate(chain) if k in s.axes), 0) for k in spatial]
    plain = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
    dtype = x.dtype
    for number, stage in enumerate(chain):
        kernel = _make_kernel(stage, number, len(chain), inside, out)
        changes = {
            name: tuple(
                given if mine == number else default
                for given, mine in zip(params[name], owner, strict=True)
            )
            for name, default in plain.items()
        }
        final = number == len(chain) - 1
        preferred = params["preferred_element_type"] if final else dtype
        x = equation.bind(x, kernel, **changes, preferred_element_type=preferred)
        tally.append(2 * math.prod(x.shape) * kernel.size // kernel.shape[out])
    return x


def _make_kernel(stage: Stage, number: int, count: int, inside: int, out: int) -> Array:
    """Put the ranks of a part where its kernel has channels."""
    rank = stage.array.ndim - 2
    axes = list(range(rank))
    if number > 0:
        axes[inside] = rank
    if number < count - 1:
        axes[out] = rank + 1
    gone = [k for k in range(rank + 2) if k not in axes]  # of length 1
    kernel = jnp.transpose(stage.array, [*axes, *gone])
    return kernel.reshape(kernel.shape[:rank])


# --- ragged_dot_general --------------------------------------------------------------------------


def _plan_ragged(
    equation: Any, operands: Sequence[Any], operand: int, node: CarriedFactors
) -> Program | str:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = numbers.dot_dimension_numbers
    groups, ragged = tuple(numbers.rhs_group_dimensions), tuple(numbers.lhs_ragged_dimensions)
    plain = operand == 1 and not x_batch and tuple(x_contract) == (1,) and ragged == (0,)
    if not plain or len(groups) != 1:
        return "the ragged contraction is no jax.lax.ragged_dot"
    (group,), (depth,) = groups, w_contract
    (free,) = {0, 1, 2} - {group, depth}
    holders = _list_holders(node)
    ends = [next(iter(holders[k]), None) for k in (depth, free)]
    if len(node.parts) != 2 or len(holders[group]) != 2 or ends not in ([0, 1], [1, 0]):
        return "its factors do not hold the sides of each expert's matrix"

    def program(x: Array, node: CarriedFactors, sizes: Array) -> Array:
        stages = _list_stages(node)
        first, second = _transpose_stages(stages) if ends == [1, 0] else stages
        # (group, depth, rank), (group, rank, free)
        a = jnp.transpose(first.array, (group, depth, 4, free, 3))[..., 0, 0]
        b = jnp.transpose(second.array, (group, 3, free, depth, 4))[..., 0, 0]
        each = functools.partial(
            lax.ragged_dot, group_sizes=sizes, precision=equation.params["precision"]
        )
        h = each(x, a, preferred_element_type=x.dtype)
        return each(h, b, preferred_element_type=equation.result_dtype)

    return program


_RULES = {
    "dot_general": _plan_dot,
    "conv_general_dilated": _plan_conv,
    "ragged_dot_general": _plan_ragged,
}
