"""`widths`: the new sizes by module path, for whoever sets them in a configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxcompress.mappings import FieldMapping
from jaxcompress.structured._groups import Groups
from jaxcompress.structured._keep import Keep


@dataclass(frozen=True, kw_only=True)
class Width:
    """One size that changes.

    Attributes:
        leaf: The leaf's name within its module.
        axis: Its axis.
        what: `"features"` (or `"channels"`, `"heads"`, `"head size"`, `"experts"`) that the leaf
            gives; `"inputs"` that it reads. Where one axis holds heads and their features, it is
            listed as both.
        old: Before.
        new: After.
    """

    leaf: str
    axis: int
    what: str
    old: int
    new: int


@dataclass(frozen=True, kw_only=True)
class Widths(FieldMapping[tuple[Width, ...]]):
    """New sizes by the path of a module: what to write into a configuration.

    Attributes:
        modules: `{module path: sizes that change}`; the path is that of the leaves without their
            last name, and empty for leaves at the top.
    """

    modules: Mapping[str, tuple[Width, ...]]

    def __str__(self) -> str:
        lines = []
        for module, sizes in self.modules.items():
            unlike = {w.what for w in sizes for v in sizes if w.what == v.what and w.old != v.old}
            # What all leaves of a module agree on is said once.
            told = dict.fromkeys(
                f"{f'{w.leaf} ' if w.what in unlike or not module else ''}"
                f"{w.what} {w.old} -> {w.new}"
                for w in sizes
            )
            lines.append(f"{module or 'fn'}: {', '.join(told)}")
        return "\n".join(lines)


def widths(keep: Keep, groups: Groups) -> Widths:
    """Say which sizes of which modules change, and to what.

    Args:
        keep: What is kept.
        groups: The groups that it was chosen from, of `groups(fn, params, *inputs)`.

    Returns:
        The sizes by module path; as text, one line for each module.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import structured
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]["w"]) @ p["down"]["w"]
        >>> params = {"up": {"w": jnp.ones((3, 8))}, "down": {"w": jnp.ones((8, 2))}}
        >>> groups = structured.groups(fn, params, jnp.ones((1, 3)))
        >>> print(widths(structured.keep(groups, {"up/w": [0, 2, 5]}), groups))
        down: inputs 8 -> 3
        up: features 8 -> 3
    """
    roles = _describe_axes(keep, groups)
    modules: dict[str, list[Width]] = {}
    for path, axes in sorted(keep.leaves.items()):
        module, _, leaf = path.rpartition("/")
        for axis in sorted(axes):
            before, after = keep.shapes[path][axis], keep.shape(path)[axis]
            for what, old, new in roles[path, axis] or [("features", before, after)]:
                size = {"leaf": leaf, "axis": axis, "what": what}
                modules.setdefault(module, []).append(Width(**size, old=old, new=new))
    return Widths(modules={module: tuple(sizes) for module, sizes in modules.items()})


def _describe_axes(keep: Keep, groups: Groups) -> dict[tuple[str, int], list[tuple[str, int, int]]]:
    """Say of each axis that shrinks what it holds, with sizes."""
    found: dict[tuple[str, int], dict[str, tuple[str, int, int]]] = {
        (path, axis): {} for path, axes in keep.leaves.items() for axis in axes
    }
    for name in keep:
        group = groups[name]
        old, new = group.size, keep[name].shape[-1]
        for member in group.members:
            key = member.path, member.axis
            axis = keep.shapes[key[0]][key[1]], keep.shape(key[0])[key[1]]
            made = "channels" if group.role == "channels" else "features"
            features = "inputs" if member.reads else made
            if group.role in _ALONE:
                own = len(keep.shapes[key[0]]) - len(member.layers) > 2
                if own or math.prod(member.indices.shape) == old:
                    found[key][group.role] = group.role, *axis
                    continue
                found[key][group.role] = group.role, old, new
            found[key][features] = features, *axis
    return {key: list(whats.values()) for key, whats in found.items()}


_ALONE = ("heads", "head size", "experts")
"""Roles whose units have an axis of their own, in leaves of more than two."""
