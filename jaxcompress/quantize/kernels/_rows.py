"""Lookups in a quantized table, and contractions of tokens that are sorted by expert."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.quantize._carried import CarriedCodes
from jaxcompress.quantize.kernels import _codes as codes_of


def find_lookup_obstacle(params: Any, node: CarriedCodes) -> str | None:
    """Say why rows of codes cannot be looked up; `None` if they can."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return "it is looked up along several axes"
    (axis,) = numbers.start_index_map
    whole = all(n == sizes[k] for k, n in enumerate(node.shape) if k != axis)
    if not whole or sizes[axis] != 1 or numbers.collapsed_slice_dims != (axis,):
        return "parts of rows are looked up"
    if node.split[axis] != 1:
        return "groups run along the axis that indices pick from"
    return None


def lookup(params: Any, node: CarriedCodes, indices: Array) -> Array:
    """Look up rows of codes and their scales, and multiply.

    Indices out of bounds give what the equation gives for them: the nearest row, or its fill.

    Returns:
        In the dtype of the array at hand, in the shape of the equation's result.
    """
    numbers = params["dimension_numbers"]
    (axis,) = numbers.start_index_map
    (stored,) = node.stored_axes[axis]
    mode = lax.GatherScatterMode.from_any(params["mode"])

    def rows(part: Array, fill: Any) -> Array:
        # -> (*indices, *the other stored axes)
        if part.shape[stored] == 1:
            return jnp.squeeze(part, stored)
        lead = indices.ndim - 1
        shape = [1 if k == stored else n for k, n in enumerate(part.shape)]
        how = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(lead, lead + part.ndim - 1)),
            collapsed_slice_dims=(stored,),
            start_index_map=(stored,),
        )
        return lax.gather(part, indices, how, tuple(shape), mode=mode, fill_value=fill)

    fill = params["fill_value"]
    values = rows(node.values, 0)
    scale = rows(node.scale, None).astype(jnp.float32)
    zero = None if node.zero is None else rows(node.zero, 0)
    found = node.format.qtype.to_numbers(values, scale, zero)
    lead = indices.shape[:-1]
    kept = [n for k, n in enumerate(node.shape) if k != axis]
    found = found.reshape(*lead, *kept).astype(node.dtype)
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        index = indices[..., 0]
        inside = (index >= 0) & (index < node.shape[axis])
        fill = jnp.nan if fill is None else fill
        found = jnp.where(
            inside.reshape(*lead, *(1 for _ in kept)), found, jnp.asarray(fill, node.dtype)
        )
    # (*lead, *kept) -> where the equation puts them
    places = [k for k in range(found.ndim) if k not in numbers.offset_dims]
    order = [0] * found.ndim
    for source, target in enumerate((*places, *numbers.offset_dims)):
        order[target] = source
    return jnp.transpose(found, order)


def find_ragged_obstacle(params: Any, operand: int, node: CarriedCodes) -> str | None:
    """Say why codes cannot enter a `ragged_dot`; `None` if they can."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, (contract,)), batch = numbers.dot_dimension_numbers
    if operand != 1 or len(numbers.rhs_group_dimensions) != 1 or any(batch):
        return "it is no plain ragged_dot"
    if node.split != (1,) * node.ndim or node.scale.shape[contract] > 1:
        return "scales vary along what the ragged_dot sums"
    return None


def ragged(params: Any, node: CarriedCodes, x: Array, sizes: Array, backend: str) -> Array:
    """Contract tokens sorted by expert with each expert's codes, and scale each token's result.

    Returns:
        float32 (or wider, as x is), in the shape of the equation's result, `(tokens, out)`.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    (_, (contract,)), _ = numbers.dot_dimension_numbers
    (group,) = numbers.rhs_group_dimensions
    (free,) = (k for k in range(3) if k not in (contract, group))
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    owner = jnp.minimum(owner, node.shape[group] - 1)
    of_token = lambda part: _per_token(part, owner, (group, contract, free))
    options = {k: params[k] for k in ("precision", "group_offset")}
    if node.activation is None:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        w = node.codes(x.dtype, backend=backend)
        sums = lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=wide, **options)
        return sums * of_token(node.scale).astype(wide)
    acts, w = codes_of.encode_sides("ragged_dot_general", params, 1, node, x, backend)
    sums = lax.ragged_dot_general(
        acts.codes,
        w.codes,
        sizes,
        numbers,
        preferred_element_type=codes_of.accumulator(node.format),
        **options,
    )
    return sums.astype(jnp.float32) * of_token(w.scale) * acts.scale


def _per_token(part: Array, owner: Array, order: tuple[int, int, int]) -> Array:
    """Give each token its expert's entry of a part: `(tokens, out or 1)`."""
    part = jnp.squeeze(jnp.transpose(part, order), 1)  # (experts or 1, out or 1)
    return part if part.shape[0] == 1 else part[owner]
