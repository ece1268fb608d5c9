"""Units of groups in arrays: sums, entries and values per unit, and which members count."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress import adapters, tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError
from jaxcompress.meshes import call_with_auto_axes
from jaxcompress.structured._groups import Group, Member

# --- One member -------------------------------------------------------------------------------


def unit_sums(member: Member, *arrays: Any, of: Callable[..., jax.Array] | None = None) -> Any:
    """Sum `of(*arrays)`, an array like the member's leaf, over each unit: `(*layers, size)`.

    Everything but a vector per layer is summed before indices are picked: no copy of the leaf.
    Outside jit one small program is compiled per shape, and the indices are picked in NumPy.
    """
    sums = _axis_sums(arrays, kept=(*member.layers, member.axis), of=of)
    if not isinstance(sums, Tracer):
        return np.take(np.asarray(sums), member.indices, axis=-1).sum(-1)  # of (*layers, size, m)
    return call_with_auto_axes(lambda x: jnp.take(x, member.indices, axis=-1).sum(-1), sums)


@functools.partial(jax.jit, static_argnames=("kept", "of"))
def _axis_sums(
    arrays: tuple[jax.Array, ...], *, kept: tuple[int, ...], of: Callable[..., jax.Array] | None
) -> jax.Array:
    """Sum over all axes but `kept`, which come out in their order: `(*layers, n)`."""
    x = arrays[0] if of is None else of(*arrays)
    sums = x.sum([k for k in range(x.ndim) if k not in kept])
    return jnp.transpose(sums, [sorted(kept).index(k) for k in kept])


def unit_entries(x: jax.Array, kept: tuple[int, ...], indices: np.ndarray) -> jax.Array:
    """Bring an array like a member's leaf into one row per unit: `(*layers, size, entries)`.

    Args:
        x: The array.
        kept: The member's layers and axis.
        indices: Its indices.
    """
    x = jnp.moveaxis(x, kept, range(len(kept)))
    x = jnp.take(x, indices, axis=len(kept) - 1)  # (*layers, size, m, *rest)
    return x.reshape(*x.shape[: len(kept)], -1)


def unit_size(shape: Sequence[int], member: Member) -> int:
    """Count the entries of one unit in one layer."""
    kept = (*member.layers, member.axis)
    rest = [n for k, n in enumerate(shape) if k not in kept]
    return int(np.prod(rest)) * member.indices.shape[1]


def spread_units(
    values: jax.Array, member: Member, shape: Sequence[int], *, fill: float
) -> jax.Array:
    """Write a value per unit, `(*layers, size)`, beside the leaf's entries.

    Returns:
        An array that broadcasts to the leaf: each unit's value at its indices, `fill` at those
        of no unit.
    """
    size, kept = values.shape[-1], (*member.layers, member.axis)
    owner = np.full(shape[member.axis], size)
    owner[member.indices] = np.arange(size)[:, None]
    rest = jnp.full((*values.shape[:-1], 1), fill, values.dtype)
    whole = jnp.take(jnp.concatenate([values, rest], axis=-1), owner, axis=-1)  # (*layers, n)
    whole = jnp.transpose(whole, [kept.index(k) for k in sorted(kept)])
    return whole.reshape([n if k in kept else 1 for k, n in enumerate(shape)])


# --- Members of groups ------------------------------------------------------------------------


def list_learned(groups: Mapping[str, Group], params: tree.Params) -> dict[str, tuple[Member, ...]]:
    """List the members of each group that training moves; statistics and counters are not.

    Leaves that params lacks (those that an optimizer does not see) are left out.

    Raises:
        ArgumentError: If a group has none.
        StructureError: If params are not those of the groups.
    """
    leaves = dict(tree.items(params))
    check_members(groups, leaves, partial=True)
    learns = adapters.learnable(params)
    chosen = {
        name: tuple(
            m
            for m in group.members
            if m.path in leaves and tree.matches(learns, m.path, leaves[m.path])
        )
        for name, group in groups.items()
    }
    bare = [name for name, members in chosen.items() if not members]
    if bare:
        raise ArgumentError(
            "groups",
            got=f"groups without a leaf that learns in params: {tree.shorten(bare)}",
            expected="groups of floating-point leaves that are not mutable state",
            fix="Leave these groups out: {name: groups[name] for name in ...}.",
        )
    return chosen


def check_members(
    groups: Mapping[str, Group], leaves: Mapping[str, Any], *, partial: bool = False
) -> None:
    """Refuse groups that do not fit params; `partial` params may lack leaves."""
    if not isinstance(groups, Mapping) or not all(isinstance(g, Group) for g in groups.values()):
        raise ArgumentTypeError(
            "groups",
            got=type(groups).__name__,
            expected="Groups, or a mapping of Group by name",
            fix="Pass structured.groups(fn, params, *inputs), or a dict of some of its groups.",
        )
    for name, group in groups.items():
        for member in group.members:
            if member.path not in leaves:
                if partial:
                    continue
                raise _explain_mismatch(name, f"no leaf {member.path!r}")
            leaf = leaves[member.path]
            shape = tuple(np.shape(leaf)) if not hasattr(leaf, "shape") else tuple(leaf.shape)
            problem = _problem(group, member, shape)
            if problem:
                raise _explain_mismatch(name, f"{member.path!r} of shape {shape}, {problem}")
            if isinstance(leaf, tree.LeafNode):
                raise ArgumentTypeError(
                    "params",
                    got=f"a {type(leaf).__name__} at {member.path!r}",
                    expected="plain arrays",
                    fix="Shrink before quantizing.",
                )


def _problem(group: Group, member: Member, shape: tuple[int, ...]) -> str:
    """Say how a member does not fit its leaf; empty if it does."""
    axes = (member.axis, *member.layers)
    if not all(0 <= k < len(shape) for k in axes):
        return f"where the group has axes {axes}"
    if member.indices.ndim != 2 or len(member.indices) != group.size:
        return f"indices of shape {member.indices.shape} for {group.size} units"
    if member.indices.size and int(member.indices.max()) >= shape[member.axis]:
        return f"where the group reaches index {member.indices.max()} along axis {member.axis}"
    if tuple(shape[k] for k in member.layers) != group.layers:
        return f"where the group has layers {group.layers} along the axes {member.layers}"
    return ""


def _explain_mismatch(name: str, got: str) -> StructureError:
    return StructureError(
        "params",
        got=f"{got} (group {name!r})",
        expected="the params that the groups were found in",
        fix="Find groups again: structured.groups(fn, params, *inputs).",
    )
