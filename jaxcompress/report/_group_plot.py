"""A picture of one group: the slices of each leaf that live and die together."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.report._plot import COLORS, FAINT, INK, Plot
from jaxcompress.structured import Group, Groups, Member

_LARGEST = 96
"""The most rows or columns that are drawn; longer axes are thinned out."""
_PER_ROW = 4


def plot_group(
    groups: Groups, name: str, keep: Mapping[str, Any] | None = None, *, title: str | None = None
) -> Plot:
    """Plot the leaves of a group as matrices, with the slices of its units in colour.

    Rows are a leaf's first axis of two, or the group's own if that is neither of the last two;
    without `keep` the units alternate between two tints, with it those that go are marked.

    Args:
        groups: From `structured.groups`.
        name: The group's name, frozen or not.
        keep: What stays, such as a `structured.Keep`; the first layer is drawn where layers differ.
        title: A heading; the group's description otherwise.

    Returns:
        The plot; `save` writes it, with the members as JSON beside it.

    Raises:
        ArgumentError: If there is no such group.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress import structured
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> plot = plot_group(structured.groups(fn, params, jnp.ones((1, 3))), "up")
        >>> [member["leaf"] for member in plot.data["members"]]
        ['up', 'down']
    """
    group = groups.get(name) or groups.frozen.get(name)
    if group is None:
        raise ArgumentError(
            "name",
            got=repr(name),
            expected="the name of a group",
            fix=f"There are {tree.shorten(sorted([*groups, *groups.frozen]))}.",
        )
    kept = np.arange(group.size)
    if keep is not None and name in keep:
        kept = np.asarray(keep[name]).reshape(-1, np.shape(keep[name])[-1])[0]
    stays = np.isin(np.arange(group.size), kept)
    shapes = {member.path: groups.leaves[member.path].shape for member in group.members}
    pictures = [_picture(member, shapes[member.path], stays) for member in group.members]
    rows = math.ceil(len(pictures) / _PER_ROW)
    columns = min(len(pictures), _PER_ROW)

    def draw(figure: Any) -> None:
        places = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for place in places[len(pictures) :]:
            place.set_axis_off()
        for place, member, picture in zip(places, group.members, pictures, strict=False):
            _draw_member(place, member, shapes[member.path], picture)
        figure.suptitle(title or group.description, color=INK, fontsize=11, fontweight="bold")

    return Plot(
        title=title or group.description,
        data={"group": name, "units": group.size, "kept": kept.tolist(), "members": _data(group)},
        size=(2.9 * columns, 2.6 * rows + 0.4),
        draw=draw,
    )


def _data(group: Group) -> list[dict[str, Any]]:
    return [
        {"leaf": m.path, "axis": m.axis, "per_unit": m.indices.shape[1], "produces": m.produces,
         "reads": m.reads}
        for m in group.members
    ]  # fmt: skip


def _picture(member: Member, shape: tuple[int, ...], stays: np.ndarray) -> np.ndarray:
    """Number the entries of a matrix: 0 other, 1 and 2 units that stay, 3 those that go."""
    along = np.zeros(shape[member.axis], np.uint8)
    for unit, indices in enumerate(member.indices):
        along[indices] = 1 + unit % 2 if stays[unit] else 3
    along = along[:: math.ceil(len(along) / _LARGEST)]
    if len(shape) == 1:
        return np.repeat(along[None], max(1, len(along) // 12), axis=0)
    is_column = member.axis == len(shape) - 1
    other = shape[-2] if is_column else shape[-1]
    other = min(other, _LARGEST)
    return np.repeat(along[None], other, 0) if is_column else np.repeat(along[:, None], other, 1)


def _draw_member(place: Any, member: Member, shape: tuple[int, ...], picture: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap, to_rgba

    tints = [to_rgba(FAINT, 0.25), to_rgba(COLORS[0], 0.85), to_rgba(COLORS[0], 0.6)]
    colors = ListedColormap([*tints, to_rgba(COLORS[1], 0.9)])
    place.imshow(picture, cmap=colors, vmin=0, vmax=3, interpolation="nearest", aspect="auto")
    place.set_xticks([])
    place.set_yticks([])
    place.grid(visible=False)
    for spine in place.spines.values():
        spine.set_visible(False)
    if len(shape) == 1 or picture.shape[0] < picture.shape[1]:
        place.set_box_aspect(max(picture.shape[0] / picture.shape[1], 0.12))
    what = "made" if member.produces else "read" if member.reads else "goes along"
    *before, last = member.path.split("/")
    folder = "/".join(before)
    lines = [folder, last] if folder else [last]
    sizes = " x ".join(map(str, shape))
    place.set_title("\n".join(lines), fontsize=8, fontweight="normal")
    place.set_xlabel(f"{sizes}, axis {member.axis}: {what}", fontsize=8)
