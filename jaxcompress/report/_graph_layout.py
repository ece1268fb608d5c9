"""Where the boxes of a graph stand: rows by depth, few crossings, straight edges, in inches.

The layered drawing of Sugiyama, Tagawa and Toda (1981): rows by longest path, points on edges
that pass a row, orders by barycentre; then places that are closest to an item's neighbours
(isotonic regression, which keeps the order and the gaps).
"""

import graphlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeAlias

GAP, ROW_GAP, LANE = 0.22, 0.3, 0.12
"""Inches between items of a row, between rows, and across an edge that passes a row."""
Point: TypeAlias = tuple[float, float]


@dataclass
class Item:
    """A box to be placed, or a frame of boxes placed already.

    Attributes:
        key: Its name.
        width: In inches.
        height: In inches.
        x: Its centre, once placed.
        y: Its top, once placed; y grows downwards.
        order: Where it stands among its likes before crossings are looked at.
        lane: Whether it is no box, but where an edge passes a row.
    """

    key: str
    width: float
    height: float
    order: int
    x: float = 0.0
    y: float = 0.0
    lane: bool = False


@dataclass
class Placed:
    """Items with their places, and what edges pass through on their way.

    Attributes:
        width: Of all, in inches.
        height: Likewise.
        items: By key.
        bends: For each edge, the points between its ends.
    """

    width: float
    height: float
    items: dict[str, Item]
    bends: dict[tuple[str, str], list[Point]] = field(default_factory=dict)


def place(items: Sequence[Item], edges: Sequence[tuple[str, str]], *, hang: bool = True) -> Placed:
    """Place items in rows, each below all that feed it.

    Args:
        items: What to place; their `x` and `y` are set.
        edges: `(from, to)` pairs of keys, without cycles.
        hang: Whether what nothing feeds stands just above what it feeds rather than on top.

    Returns:
        The places, from (0, 0).
    """
    depth = _depths(items, edges, hang=hang)
    nodes = {item.key: item for item in items}
    row_of = {item.key: depth[item.key] for item in items}
    links: list[tuple[str, str]] = []
    lanes: dict[tuple[str, str], list[str]] = {}
    for a, b in edges:
        lane = [f"{a}\0{b}\0{row}" for row in range(depth[a] + 1, depth[b])]
        for row, key in enumerate(lane, depth[a] + 1):
            nodes[key] = Item(key=key, width=LANE, height=0.0, order=nodes[a].order, lane=True)
            row_of[key] = row
        lanes[a, b] = lane
        links += itertools.pairwise([a, *lane, b])
    rows: list[list[Item]] = [[] for _ in range(max(row_of.values()) + 1)]
    for key, item in nodes.items():
        rows[row_of[key]].append(item)
    _untangle(rows, links)
    _straighten(rows, links)
    left = min(item.x - item.width / 2 for item in nodes.values())
    width = max(item.x + item.width / 2 for item in nodes.values()) - left
    top = 0.0
    for row in rows:
        height = max(item.height for item in row)
        for item in row:
            item.x, item.y = item.x - left, top
            if item.lane:
                item.height = height
        top += height + ROW_GAP
    bends = {
        edge: [(nodes[k].x, y) for k in lane for y in (nodes[k].y, nodes[k].y + nodes[k].height)]
        for edge, lane in lanes.items()
    }
    return Placed(width, top - ROW_GAP, {item.key: item for item in items}, bends)


def _depths(
    items: Sequence[Item], edges: Sequence[tuple[str, str]], *, hang: bool
) -> dict[str, int]:
    """Number the rows by longest path."""
    above, below = _list_neighbours(edges)
    feeders = {item.key: above.get(item.key, []) for item in items}
    depth: dict[str, int] = {}
    for key in graphlib.TopologicalSorter(feeders).static_order():
        depth[key] = max((depth[a] + 1 for a in feeders[key]), default=0)
    for key, fed in below.items():
        if hang and not feeders[key]:
            depth[key] = min(depth[b] for b in fed) - 1
    return depth


def _untangle(rows: list[list[Item]], links: Sequence[tuple[str, str]]) -> None:
    """Order each row by the mean place of its neighbours above, then below, a few times over."""
    above, below = _list_neighbours(links)
    for row in rows:
        row.sort(key=lambda item: item.order)
    place_of = {item.key: k - len(row) / 2 for row in rows for k, item in enumerate(row)}
    best = ([list(row) for row in rows], _crossings(rows, links))
    for sweep in range(8):
        near, ordered = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in ordered:
            row.sort(key=_barycentre(near, place_of))
            place_of.update({item.key: k - len(row) / 2 for k, item in enumerate(row)})
        count = _crossings(rows, links)
        if count < best[1]:
            best = ([list(row) for row in rows], count)
    for row, kept in zip(rows, best[0], strict=True):
        row[:] = kept


def _list_neighbours(
    links: Sequence[tuple[str, str]],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for a, b in links:
        above.setdefault(b, []).append(a)
        below.setdefault(a, []).append(b)
    return above, below


def _barycentre(
    near: dict[str, list[str]], place_of: dict[str, float]
) -> Callable[[Item], tuple[float, int]]:
    def key(item: Item) -> tuple[float, int]:
        places = [place_of[k] for k in near.get(item.key, [])] or [place_of[item.key]]
        return sum(places) / len(places), item.order

    return key


def _crossings(rows: list[list[Item]], links: Sequence[tuple[str, str]]) -> int:
    where = {item.key: (r, k) for r, row in enumerate(rows) for k, item in enumerate(row)}
    by_row: dict[int, list[tuple[int, int]]] = {}
    for a, b in links:
        by_row.setdefault(where[a][0], []).append((where[a][1], where[b][1]))
    return sum(
        (a - c) * (b - d) < 0
        for ends in by_row.values()
        for (a, b), (c, d) in itertools.combinations(ends, 2)
    )


def _straighten(rows: list[list[Item]], links: Sequence[tuple[str, str]]) -> None:
    """Move items below the middle of what feeds them, or above what they feed, in turns."""
    by_key = {item.key: item for row in rows for item in row}
    above, below = _list_neighbours(links)
    for row in rows:
        _spread(row, [0.0] * len(row))
    for sweep in range(11):  # the last one goes down
        near, ordered = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in ordered:
            _spread(
                row, [median(by_key[k].x for k in near.get(item.key, [item.key])) for item in row]
            )


def _spread(row: Sequence[Item], wanted: Sequence[float]) -> None:
    """Place a row as close as can be to what is wanted (least squares) without overlaps."""
    offset, offsets = 0.0, []
    for k, item in enumerate(row):
        if k:
            offset += (row[k - 1].width + item.width) / 2 + GAP
        offsets.append(offset)
    pools: list[list[float]] = []  # [sum, count] of items that have to move as one
    for want, shift in zip(wanted, offsets, strict=True):
        pools.append([want - shift, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    places = [total / count for total, count in pools for _ in range(int(count))]
    for item, place_, shift in zip(row, places, offsets, strict=True):
        item.x = place_ + shift
