"""Placing batches, params and everything that mirrors params over a device mesh."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.tree import Params, Where

Rules: TypeAlias = Mapping[Where, PartitionSpec]
"""`{where: PartitionSpec}`; the first rule that selects a leaf decides, the rest are replicated."""


def shard(state: Any, *, mesh: Mesh, sharding: Rules | None = None) -> Any:
    """Copy a state onto a mesh, its params split by the rules and their mirrors split likewise.

    A leaf of the optimizer's state mirrors a parameter if its path ends in the parameter's path
    and the shapes agree: momenta and masks do; counters and factored moments do not and are
    replicated.

    Args:
        state: A `State`.
        mesh: The devices. Explicit axes are taken as Auto ones, so that any loss can be sharded.
        sharding: `{where: PartitionSpec}` over `state.params`; without rules, all is replicated.

    Returns:
        The state on the mesh, sharing no buffer with the one given.

    Raises:
        SelectionError: If a rule selects nothing.
        ArgumentError: If a rule names an unknown axis, or one that does not divide the leaf.

    Example:
        >>> import optax
        >>> from jaxcompress import train
        >>> state = train.init({"w": jnp.ones((4, 2))}, optax.adam(1e-3),
        ...                    key=jax.random.key(0))
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> state = shard(state, mesh=mesh, sharding={"w": PartitionSpec("model")})
        >>> state.opt_state[0].mu["w"].sharding.spec == PartitionSpec("model")
        True
    """
    # device_put may alias, and a step that donates the copy would take the original with it.
    copied = jax.tree.map(jnp.copy, state)
    return jax.device_put(copied, state_shardings(state, make_automatic(mesh), sharding))


def make_automatic(mesh: Mesh) -> Mesh:
    """Give the same mesh with Auto axes, where the compiler propagates shardings.

    Args:
        mesh: A mesh with axes of any type.

    Returns:
        The mesh with Auto axes.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def state_shardings(state: Any, mesh: Mesh, rules: Rules | None) -> Any:
    """Decide where each leaf of a state goes.

    Args:
        state: A `State` of arrays, tracers or `ShapeDtypeStruct`s.
        mesh: The devices.
        rules: See `shard`.

    Returns:
        A `State` of `NamedSharding`s.

    Raises:
        SelectionError: If a rule selects nothing.
        ArgumentError: If a rule names an unknown axis, or one that does not divide the leaf.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    specs = _list_specs(state.params, rules or {})
    for path, leaf in tree.items(state.params):
        _check_spec(path, leaf, specs.get(path, PartitionSpec()), mesh)
    shapes = {path: leaf.shape for path, leaf in tree.items(state.params)}

    def place(keypath: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # Past the State field, longest tail first: `mu/b/w` mirrors `b/w` rather than `w`.
        for i in range(1, len(keypath) + 1):
            path = tree.path_str(keypath[i:])
            if path in specs and shapes[path] == leaf.shape:
                return NamedSharding(mesh, specs[path])
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def batch_shardings(batch: Any, mesh: Mesh, data_axis: str | tuple[str, ...]) -> Any:
    """Split every leaf of a batch along its first axis.

    Args:
        batch: A pytree of arrays of one leading size.
        mesh: The devices.
        data_axis: The mesh axis, or axes, to split over.

    Returns:
        A tree of `NamedSharding`s.

    Raises:
        ArgumentError: If the mesh has no such axis, or it does not divide the batch.
    """
    spec = PartitionSpec(data_axis)
    for path, leaf in tree.items(batch):
        _check_spec(f"batch/{path}" if path else "batch", leaf, spec, mesh)
    return jax.tree.map(lambda _: NamedSharding(mesh, spec), batch)


def _list_specs(params: Params, rules: Rules) -> dict[str, PartitionSpec]:
    specs: dict[str, PartitionSpec] = {}
    for where, spec in rules.items():
        for path in tree.select(params, where):
            specs.setdefault(path, spec)
    return specs


def _check_spec(path: str, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> None:
    """Refuse a spec that the mesh or the leaf cannot follow, and name the argument."""
    if len(spec) > len(leaf.shape):
        raise ArgumentError(
            "sharding",
            got=f"{spec} for {path!r} of shape {leaf.shape}",
            expected="at most one entry per axis of the leaf",
            fix="Narrow the rule's `where`.",
        )
    for size, names in zip(leaf.shape, spec, strict=False):
        names = names if isinstance(names, tuple) else () if names is None else (names,)
        unknown = [name for name in names if name not in mesh.shape]
        if unknown:
            raise ArgumentError(
                "mesh",
                got=f"axes {mesh.axis_names}",
                expected=f"an axis {unknown[0]!r}, over which {path!r} is split",
                fix="Rename the mesh axis, or say data_axis=... or another rule.",
            )
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ArgumentError(
                "sharding",
                got=f"{path!r} of shape {leaf.shape}, split {parts} ways over {names}",
                expected="a size that the devices divide",
                fix="Change the size (for a batch, drop_last=True), or replicate the leaf.",
            )
