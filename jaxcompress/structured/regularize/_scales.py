"""Norm scales: finding them, and scoring units by theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError
from jaxcompress.structured._groups import Group, Member
from jaxcompress.structured.importance._method import Given, Method
from jaxcompress.structured.importance._units import list_learned, unit_sums

_NAMES = ("scale", "gamma", "weight")


def scales(
    groups: Mapping[str, Group], fn: Callable[..., Any], params: tree.Params, *inputs: Any
) -> tuple[str, ...]:
    """Find the norm scales among the members of groups: learned leaves that only ever multiply.

    Whatever they are called: a scale is a leaf outside any contraction that fn consumes by `mul`
    alone. The scales of other norms and of LayerScale are found, too.

    Args:
        groups: The groups.
        fn: `fn(params, *inputs) -> outputs`.
        params: Its params; shapes are enough.
        *inputs: Inputs; shapes are enough.

    Returns:
        Their paths: a `where` for `BatchNormScale` and `scale_l1`.

    Example:
        >>> import numpy as np
        >>> from jaxcompress import structured
        >>> fn = lambda p, x: (x @ p["w"]) * p["g"] + p["b"]
        >>> params = {"w": jnp.ones((2, 3)), "g": jnp.ones(3), "b": jnp.ones(3)}
        >>> member = lambda path, axis: structured.Member(
        ...     path=path, axis=axis, indices=np.arange(3)[:, None],
        ...     produces=path == "w", reads=False)
        >>> group = structured.Group(
        ...     name="w", size=3, role="hidden", description="hidden",
        ...     members=(member("w", 1), member("g", 0), member("b", 0)))
        >>> scales({"w": group}, fn, params, jnp.ones((1, 2)))
        ('g',)
    """
    traced = graph.trace(fn, params, *inputs)
    members = list_learned(groups, params)
    paths = dict.fromkeys(m.path for several in members.values() for m in several)

    def multiplies(path: str) -> bool:
        uses = {use.primitive for use in traced.uses.get(path, ())}
        return uses == {"mul"} and not traced.sites_of(path) and path not in traced.returned

    return tuple(path for path in paths if multiplies(path))


def scale_members(
    members: Mapping[str, tuple[Member, ...]], where: tree.Where | None, leaves: Mapping[str, Any]
) -> dict[str, tuple[Member, ...]]:
    """Choose the members that are norm scales, by `where` or by name; refuse a group without."""

    def is_scale(member: Member) -> bool:
        if where is not None:
            return tree.matches(where, member.path, leaves[member.path])
        along = not (member.produces or member.reads)
        return along and member.path.split("/")[-1] in _NAMES

    found = {name: tuple(m for m in several if is_scale(m)) for name, several in members.items()}
    bare = [name for name, several in found.items() if not several]
    if bare:
        named = "`where` selects" if where is not None else f"are called {', '.join(_NAMES)}"
        raise ArgumentError(
            "groups",
            got=f"groups without norm scales that {named}: {tree.shorten(bare)}",
            expected="a norm scale in each group",
            fix="Pass the other groups only, or where=structured.scales(groups, fn, params, x).",
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchNormScale(Method):
    """Score by the norm scales that multiply a unit, |gamma|; train with `scale_l1` before.

    Attributes:
        where: Which leaves are scales, such as what `scales` finds in the graph. By default the
            members outside contractions that are called `scale`, `gamma` or `weight`.

    Reference:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
        arXiv:1708.06519, section 3.
    """

    where: tree.Where | None = None

    def prepare(self, given: Given) -> dict[str, tuple[Member, ...]]:
        """Find the scales."""
        return scale_members(given.learned, self.where, given.leaves)

    def parts(
        self, group: Group, given: Given, prepared: dict[str, tuple[Member, ...]]
    ) -> list[ArrayLike]:
        """Sum |gamma| per unit, for each norm."""
        return [unit_sums(m, given.array(m), of=jnp.abs) for m in prepared[group.name]]
