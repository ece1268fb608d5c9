"""The picture of a graph: sites from top to bottom, as wide as what they cost."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxcompress.errors import ArgumentError, require_one_of
from jaxcompress.graph import Graph, Site, Summary
from jaxcompress.report._graph_fold import Run, find_runs, share_prefix, short_names
from jaxcompress.report._graph_layout import Item, Placed, Point, place
from jaxcompress.report._plot import COLORS, FAINT, INK, Plot, elide
from jaxcompress.report._units import abbreviate

Width: TypeAlias = Literal["flops", "params", "bytes"]

_COLOR = {
    "dot_general": COLORS[0],
    "gather": COLORS[1],
    "conv_general_dilated": COLORS[2],
    "ragged_dot_general": COLORS[3],
}
_UNIT = {"flops": "FLOP", "params": " params", "bytes": "B"}
_BOX, _THINNEST, _NAME, _SMALL = 0.17, 0.03, 8.5, 7.5
"""Height of a box and its least width in inches; sizes of its two lines of text in points."""
_TEXT = 0.33  # inches below a box for its two lines
_MARGIN, _PAD, _HEAD = 0.25, 0.16, 0.78  # inches: around all, inside a frame, for the headings
_LEAST, _MOST = 7.2, 9.0  # inches of width: that of the other plots, and what a page can show


@dataclass(frozen=True, kw_only=True)
class _Box:
    """A site, or the sites of one place in repeated layers.

    Attributes:
        key: The first site's name.
        label: What is written below it.
        note: What is written below that.
        primitive: The primitive's name.
        shape: The leaf's shape without stacked axes.
        size: What its width shows, over all layers and repeats.
        share: The part of the whole that this is.
        names: All sites that it stands for.
    """

    key: str
    label: str
    note: str
    primitive: str
    shape: tuple[int, ...]
    size: int
    share: float
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _LayerFrame:
    """A frame around the boxes of repeated layers.

    Attributes:
        key: Unlike that of any site.
        label: Which layers, and how many.
        boxes: Their keys.
    """

    key: str
    label: str
    boxes: tuple[str, ...]

    def stands_between(self, outside: str, inside: str) -> bool:
        """Tell whether the second box is in the frame and the first is not."""
        return inside in self.boxes and outside not in self.boxes


def plot_graph(
    graph: Graph | Summary,
    *,
    width: Width = "flops",
    fold: bool = True,
    title: str = "Where the computation is",
) -> Plot:
    """Draw the sites of a function from top to bottom, each as wide as what it costs.

    A line joins two sites if one computes what the other reads and no third stands between, so
    a residual connection past a site is not drawn. Below each box stand the leaf's path (without
    what all paths share), how often a scan runs it (`× 24`), the leaf's shape (one layer of a
    stack), and its share of the whole.

    Args:
        graph: What `graph.trace` or `graph.summary` gave.
        width: What the widths show: FLOPs, params or bytes, over all repeats. Lookups have no
            FLOPs and are thin; a leaf with several sites shows its params at each.
        fold: Draw consecutive layers of the same structure once, framed, with their number; the
            widths and shares in the frame are those of all these layers together.
        title: A heading.

    Returns:
        The plot; `save` writes it, and what it shows as JSON beside it.

    Raises:
        ArgumentError: If there is no site, or `width` is not known.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.graph import trace
        >>> params = {f"layer_{k}": jnp.ones((4, 4)) for k in range(3)}
        >>> def fn(params, x):
        ...     for k in range(3):
        ...         x = jnp.tanh(x @ params[f"layer_{k}"])
        ...     return x
        >>> plot = plot_graph(trace(fn, params, jnp.ones((2, 4))))
        >>> [(box["label"], box["times"], box["flops"]) for box in plot.data["boxes"]]
        [('layer_0', 3, 192)]
    """
    graph = graph.graph if isinstance(graph, Summary) else graph
    if not graph.sites:
        raise ArgumentError(
            "graph",
            got="a function that contracts none of its params",
            expected="at least one site",
            fix="Check that fn uses the params that were traced.",
        )
    require_one_of("width", width, tuple(_UNIT), fix="Choose one of them.")
    folded = find_runs(graph) if fold else []
    boxes, frames = _boxes(graph, folded, width)
    edges = _edges(graph, boxes)
    for bar in (2.4, 1.8, 1.3, 0.9, 0.6):
        placed = _place_boxes(boxes, frames, edges, bar)
        if placed.width + 2 * _MARGIN <= _MOST:
            break
    lines = _headings(graph, width)
    data = {
        "width": width,
        "boxes": [_describe_box(graph, box, frames, edges) for box in boxes],
        "elsewhere": {
            "contractions": len(graph.elsewhere),
            "flops": sum(one.flops for one in graph.elsewhere),
        },
        "total": {key: _measure_graph(graph, key) for key in _UNIT},
    }
    size = (
        round(max(_LEAST, placed.width + 2 * _MARGIN), 2),
        round(_HEAD + placed.height + _MARGIN, 2),
    )

    def draw(figure: Any) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0))  # inches, from the top left
        axes.axis("off")
        axes.text(_MARGIN, 0.26, title, fontsize=11, fontweight="bold", color=INK, va="center")
        axes.text(_MARGIN, 0.47, lines, fontsize=_SMALL, color=INK, alpha=0.8, va="center")
        left = (size[0] - placed.width) / 2
        _legend(axes, boxes, size[0])
        _draw_graph(axes, placed, boxes, frames, edges, (left, _HEAD), bar)

    return Plot(title=title, data=data, size=size, draw=draw)


# --- what is drawn -------------------------------------------------------------------------------


def _boxes(graph: Graph, folded: Sequence[Run], width: str) -> tuple[list[_Box], list[_LayerFrame]]:
    sites, boxes, frames, k = graph.sites, [], [], 0
    shared = share_prefix([site.path for site in sites])
    short = short_names([site.path for site in sites])
    by_start = {run.start: run for run in folded}
    total = _measure_graph(graph, width)
    while k < len(sites):
        run = by_start.get(k, Run(k, 1, 1, "", 0, 0))
        block = sites[k : k + run.length]
        labels = _labels(block, run) if run.times > 1 else {s.path: short[s.path] for s in block}
        for i, site in enumerate(block):
            same = [sites[k + i + run.length * j] for j in range(run.times)]
            boxes.append(_box(graph, site, same, labels[site.path], width, total))
        if run.times > 1:
            keys = tuple(site.name for site in block)
            frames.append(_LayerFrame(key=f"\0{k}", label=_frame_label(run, shared), boxes=keys))
        k = run.stop
    return boxes, frames


def _labels(block: Sequence[Site], run: Run) -> dict[str, str]:
    """Shorten the paths of one layer: what stands after its number."""
    front = "" if run.prefix == "#" else f"{run.prefix}{run.first}"
    rest = {site.path: site.path.removeprefix(front).lstrip("/_.") for site in block}
    if not all(rest.values()):
        return {site.path: site.path.rsplit("/", 1)[-1] for site in block}
    short = short_names(list(rest.values()))
    return {path: short[one] for path, one in rest.items()}


def _frame_label(run: Run, shared: str) -> str:
    if run.prefix == "#":
        return f"the same leaves, × {run.times}"
    front = run.prefix.removeprefix(shared)
    return f"{front}{run.first} … {run.last},  × {run.times}"


def _box(
    graph: Graph, site: Site, same: Sequence[Site], label: str, width: str, total: int
) -> _Box:
    leaf = tuple(graph.leaves[site.path].shape)
    shape = tuple(n for k, n in enumerate(leaf) if k not in site.axes.stacked)
    size = sum(_measure_site(graph, one, width) for one in same)
    counter = re.search(r"#\d+$", site.name)
    label = elide(label, 34) + (f" {counter[0]}" if counter and len(same) == 1 else "")
    if not site.bounded:
        label += " × ?"
    elif site.stack:
        label += f" × {math.prod(site.stack)}"
    part = size / max(total, 1)
    text = "×".join(map(str, shape)) or "scalar"
    return _Box(
        key=site.name,
        label=label,
        note=f"{text} · {100 * part:.1f} %",
        primitive=site.primitive,
        shape=shape,
        size=size,
        share=part,
        names=tuple(one.name for one in same),
    )


def _measure_site(graph: Graph, site: Site, width: str) -> int:
    if width == "params":
        return math.prod(graph.leaves[site.path].shape)
    return site.flops if width == "flops" else site.bytes


def _measure_graph(graph: Graph, width: str) -> int:
    if width == "flops":
        return graph.flops
    if width == "params":
        return sum(math.prod(leaf.shape) for leaf in graph.leaves.values())
    return sum(one.bytes for one in (*graph.sites, *graph.elsewhere))


def _edges(graph: Graph, boxes: Sequence[_Box]) -> list[tuple[str, str]]:
    """List which box feeds which, each pair once."""
    box_of = {name: box.key for box in boxes for name in box.names}
    order = {box.key: k for k, box in enumerate(boxes)}
    pairs = {
        (box_of[name], box_of[site.name]): None for site in graph.sites for name in site.upstream
    }
    # From one layer to the next of the same frame: the frame says so already.
    return [(a, b) for a, b in pairs if order[a] < order[b]]


def _headings(graph: Graph, width: str) -> str:
    total, unit = _measure_graph(graph, width), _UNIT[width]
    sites = f"{len(graph.sites)} site{'s' * (len(graph.sites) > 1)}"
    text = f"Widths show {abbreviate(total, unit)} in all, {sites}."
    if graph.elsewhere and width != "params":
        part = sum(getattr(one, width) for one in graph.elsewhere)
        count = len(graph.elsewhere)
        text += f" Not drawn: {count} contraction{'s' * (count > 1)} without a leaf"
        text += f", {100 * part / max(total, 1):.1f} %."
    return text


def _describe_box(
    graph: Graph, box: _Box, frames: Sequence[_LayerFrame], edges: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    sites = [graph[name] for name in box.names]
    return {
        "name": box.key,
        "label": box.label,
        "primitive": box.primitive,
        "shape": list(box.shape),
        "times": len(sites),
        "stack": list(sites[0].stack),
        "sites": list(box.names),
        "frame": next((f.label for f in frames if box.key in f.boxes), None),
        "flops": sum(site.flops for site in sites),
        "params": sum(math.prod(graph.leaves[site.path].shape) for site in sites),
        "bytes": sum(site.bytes for site in sites),
        "share": box.share,
        "fed_by": [a for a, b in edges if b == box.key],
    }


# --- where it stands -----------------------------------------------------------------------------


def _bar(box: _Box, boxes: Sequence[_Box], widest: float) -> float:
    return max(_THINNEST, widest * (box.size / max(1, *(one.size for one in boxes))))


def _place_boxes(
    boxes: Sequence[_Box],
    frames: Sequence[_LayerFrame],
    edges: Sequence[tuple[str, str]],
    widest: float,
) -> Placed:
    """Place the boxes of each frame, then the frames among the other boxes."""
    items = {
        box.key: Item(
            key=box.key,
            width=max(
                _bar(box, boxes, widest),
                text_inches(box.label, _NAME),
                text_inches(box.note, _SMALL),
            ),
            height=_BOX + _TEXT,
            order=k,
        )
        for k, box in enumerate(boxes)
    }
    frame_of = {key: frame.key for frame in frames for key in frame.boxes}
    inner = {}
    for frame in frames:
        mine = [items[key] for key in frame.boxes]
        inside = [(a, b) for a, b in edges if a in frame.boxes and b in frame.boxes]
        inner[frame.key] = place(mine, inside, hang=False)
    outer = {}
    for frame in frames:
        # Wide enough that the label stands to the left of all edges that come in.
        entries = [inner[frame.key].items[b].x for a, b in edges if frame.stands_between(a, b)]
        first = min(entries, default=inner[frame.key].width)
        pad = max(_PAD, text_inches(frame.label, _NAME) + 0.2 - first)
        outer[frame.key] = Item(
            key=frame.key,
            width=inner[frame.key].width + 2 * pad,
            height=inner[frame.key].height + 2 * _PAD + 0.2,
            order=items[frame.boxes[0]].order,
        )
    outer |= {key: item for key, item in items.items() if key not in frame_of}
    crossing = {
        (a, b): (frame_of.get(a, a), frame_of.get(b, b))
        for a, b in edges
        if frame_of.get(a, a) != frame_of.get(b, b)
    }
    whole = place(list(outer.values()), list(dict.fromkeys(crossing.values())))
    bends = {edge: whole.bends[between] for edge, between in crossing.items()}
    for frame in frames:
        outside, inside = whole.items[frame.key], inner[frame.key]
        dx, dy = outside.x - inside.width / 2, outside.y + _PAD + 0.2
        for item in inside.items.values():
            item.x, item.y = item.x + dx, item.y + dy
        bends |= {e: [(x + dx, y + dy) for x, y in points] for e, points in inside.bends.items()}
        for a, b in crossing:  # straight through the frame's border
            if frame.stands_between(a, b):
                bends[a, b] = [*bends[a, b], (items[b].x, outside.y)]
            elif frame.stands_between(b, a):
                bends[a, b] = [(items[a].x, outside.y + outside.height), *bends[a, b]]
    return Placed(whole.width, whole.height, {**items, **whole.items}, bends)


_NARROW, _WIDE = frozenset("iljtfrI.,:;'|/()[] ·-"), frozenset("mwMWGOQ×%@…")


def text_inches(text: str, points: float) -> float:
    """Estimate how wide a text is, without a font at hand; rather too wide than too narrow.

    Args:
        text: One line.
        points: Its size.

    Returns:
        Inches.
    """
    ems = sum(0.43 if c in _NARROW else 1.0 if c in _WIDE else 0.66 for c in text)
    return ems * points / 72


# --- how it is drawn -----------------------------------------------------------------------------


def _draw_graph(
    axes: Any,
    placed: Placed,
    boxes: Sequence[_Box],
    frames: Sequence[_LayerFrame],
    edges: Sequence[tuple[str, str]],
    origin: Point,
    widest: float,
) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    dx, dy = origin
    for frame in frames:
        item = placed.items[frame.key]
        left, top = item.x - item.width / 2 + dx, item.y + dy
        style = {"boxstyle": "round,pad=0,rounding_size=0.08", "fill": False, "linewidth": 1}
        patch = FancyBboxPatch((left, top), item.width, item.height, edgecolor=FAINT, **style)
        axes.add_patch(patch)
        axes.text(left + 0.1, top + 0.15, frame.label, fontsize=_NAME, color=INK, va="center")
    for a, b in edges:
        _line(axes, _route(placed, a, b, origin))
    for box in boxes:
        item = placed.items[box.key]
        x, y, bar = item.x + dx, item.y + dy, _bar(box, boxes, widest)
        color = _color(box.primitive)
        axes.add_patch(Rectangle((x - bar / 2, y), bar, _BOX, facecolor=color, linewidth=0))
        line = {"ha": "center", "va": "baseline", "color": INK}
        axes.text(x, y + _BOX + 0.14, box.label, fontsize=_NAME, **line)
        axes.text(x, y + _BOX + 0.28, box.note, fontsize=_SMALL, alpha=0.75, **line)


def _color(primitive: str) -> str:
    return _COLOR.get(primitive, COLORS[5])


def _route(placed: Placed, a: str, b: str, origin: Point) -> list[Point]:
    """List the points of an edge: from below one box, past others, to the top of the next."""
    start, end = placed.items[a], placed.items[b]
    points = [(start.x, start.y + start.height), *placed.bends[a, b], (end.x, end.y)]
    return [(x + origin[0], y + origin[1]) for x, y in points]


def _line(axes: Any, points: Sequence[Point]) -> None:
    """Draw an edge that leaves and enters every point vertically."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    vertices, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        vertices += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Path.CURVE4] * 3
    patch = PathPatch(Path(vertices, codes), fill=False, edgecolor=FAINT, linewidth=1, zorder=0.5)
    axes.add_patch(patch)


def _legend(axes: Any, boxes: Sequence[_Box], width: float) -> None:
    """Say at the top right which colour is which primitive."""
    from matplotlib.patches import Rectangle

    x = width - _MARGIN
    for name in sorted({box.primitive for box in boxes}, reverse=True):
        x -= text_inches(name, _SMALL)
        axes.text(x, 0.26, name, fontsize=_SMALL, color=INK, va="center")
        square = Rectangle((x - 0.16, 0.21), 0.1, 0.1, facecolor=_color(name), linewidth=0)
        axes.add_patch(square)
        x -= 0.34
