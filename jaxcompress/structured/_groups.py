"""Groups: which slices of which leaves must shrink together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from jaxcompress import graph, tree
from jaxcompress.errors import SelectionError
from jaxcompress.mappings import FieldMapping

Role: TypeAlias = Literal[
    "channels", "embedding", "experts", "head size", "heads", "hidden", "residual", "state"
]
"""What the units of a group are, in one word."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """The slices of one leaf that belong to a group.

    Attributes:
        path: The leaf's path.
        axis: The leaf's axis.
        indices: (size, m) indices along the axis: row `u` goes when unit `u` of the group does.
            A head of 64 features has 64 of them in the axis of features.
        produces: Whether the leaf's site computes the group's units here (an output axis of a
            kernel); otherwise it reads them (a contracted axis) or goes along (a bias, a scale).
        reads: Whether the leaf's site contracts the group's units here.
        layers: Axes of the leaf along which each entry has a keep-set of its own: stacked layers.
    """

    path: str
    axis: int
    indices: np.ndarray
    produces: bool
    reads: bool
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Units that can be removed one by one, each from all members at once.

    Attributes:
        name: The path of the leaf that produces it; `#1`, `#2`, ... tell several apart.
        size: How many units there are.
        members: Where they are.
        role: What they are.
        description: The same in words.
        layers: `()`, or the lengths of the stacked layers that have keep-sets of their own.
        round_to: Numbers of units to keep are multiples of it (or all).
        frozen: Why nothing of it can be removed; `None` if it can.
        labels: The labels of its units in `Groups.dims`.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    role: Role
    description: str
    layers: tuple[int, ...] = ()
    round_to: int = 1
    frozen: str | None = None
    labels: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups(FieldMapping[Group]):
    """The groups of a function by name, those that can be pruned; `frozen` has the others.

    Attributes:
        prunable: Groups that can be pruned, what the mapping shows.
        leaves: `{path: ShapeDtypeStruct}` of params.
        frozen: Groups that cannot be pruned, each with its reason.
        dims: The labels that they were found from.
        fn: The function.
        like: Its params as shapes.
        inputs: Its inputs as shapes.
        kwargs: Its keyword arguments as shapes.
    """

    prunable: Mapping[str, Group]
    frozen: Mapping[str, Group]
    leaves: Mapping[str, Any] = field(repr=False)
    dims: graph.Dims | None = field(default=None, repr=False)
    fn: Callable[..., Any] | None = field(default=None, repr=False)
    like: Any = field(default=None, repr=False)
    inputs: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)


def check_keys(argument: str, keys: Iterable[str], groups: Iterable[Group]) -> None:
    """Refuse keys that are no role, and match the name of no group."""
    groups = list(groups)
    unused = [
        key
        for key in keys
        if key not in get_args(Role) and not any(matches_group(key, group) for group in groups)
    ]
    if unused:
        names = sorted({group.role for group in groups} | {group.name for group in groups})
        raise SelectionError(
            argument,
            got=f"{tree.shorten(unused)}, which match no group",
            expected="roles, or globs over names of groups",
            fix=f"There are: {tree.shorten(names)}.",
        )


def matches_group(key: str, group: Group) -> bool:
    """Tell whether a key is a group's role, a glob over its name, or `*`."""
    return key in ("*", group.role) or tree.matches(key, group.name)


def find_group(groups: Groups, name: str, argument: str) -> Group:
    """Find a group that can shrink, for an argument of a function.

    Raises:
        SelectionError: If there is none of that name, or it is frozen.
    """
    if name in groups:
        return groups[name]
    got = f"an unknown group {name!r}"
    if name in groups.frozen:
        # Several axes of a leaf may be frozen, under names that count up.
        alike = [g for key, g in groups.frozen.items() if key.split("#")[0] == name]
        why = dict.fromkeys(str(g.frozen) for g in alike or [groups.frozen[name]])
        got = f"the frozen group {name!r}: {'; '.join(why)}"
    raise SelectionError(
        argument,
        got=got,
        expected="groups of this function that can shrink",
        fix=f"These can: {tree.shorten(sorted(groups))}.",
    )
