"""Folding of repeated layers: runs of sites that are the same but for one number in their names."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxcompress.graph import Graph, Site

_WORTH = 2  # boxes that a frame has to spare


class Run(NamedTuple):
    """A block of sites that stands for `times` consecutive ones like it.

    Attributes:
        start: Number of the first site.
        length: Sites in one block.
        times: How many blocks there are.
        prefix: The names up to the number that changes from block to block.
        first: That number in the first block.
        last: That number in the last one.
    """

    start: int
    length: int
    times: int
    prefix: str
    first: int
    last: int

    @property
    def stop(self) -> int:
        """The number of the first site after the run."""
        return self.start + self.length * self.times


class _Change(NamedTuple):
    """How a name differs from another: `prefix` and `step` of the one number that changed."""

    prefix: str
    step: int
    first: int


def find_runs(graph: Graph) -> list[Run]:
    """Find the repeated layers of a graph.

    Args:
        graph: The graph.

    Returns:
        Runs that do not overlap, in order, those that cover most sites preferred; each spares at
        least two boxes. Within a run blocks agree in everything but one number in the paths:
        primitives, shapes, scopes, and which site feeds which, within a block and from the one
        before.
    """
    sites, number = graph.sites, {site.name: k for k, site in enumerate(graph.sites)}
    kinds = [_classify_site(graph, site) for site in sites]
    # Layers are as far apart as names that differ in one number.
    before: dict[Any, int] = {}
    periods = set()
    for k, site in enumerate(sites):
        for template in _templates(site.name):
            if (kinds[k], template) in before:
                periods.add(k - before[kinds[k], template])
            before[kinds[k], template] = k
    found = [run for period in sorted(periods) for run in _of_period(sites, kinds, period)]
    found = [checked for run in found if (checked := _shorten_to_alike(sites, number, run))]
    found = [run for run in found if run.length * (run.times - 1) >= _WORTH]
    # The widest first; of two that cover as much, the one with more, smaller blocks.
    found.sort(key=lambda run: (-run.length * run.times, run.length, run.start))
    chosen: list[Run] = []
    for run in found:
        if all(run.stop <= other.start or other.stop <= run.start for other in chosen):
            chosen.append(run)
    return sorted(chosen)


def _classify_site(graph: Graph, site: Site) -> Any:
    shape = tuple(graph.leaves[site.path].shape)
    path = re.sub(r"\d+", "0", site.path)
    # Layers may be jitted under names of their own; branches of a `cond` stay apart.
    scope = tuple(re.sub(r"\d+", "0", s) if s.startswith("jit(") else s for s in site.scope)
    return path, shape, site.primitive, site.axes, site.output.shape, site.stack, scope


def _split_at_numbers(name: str) -> list[str]:
    """Cut a name at its numbers; the counter of a leaf's sites, `#1`, is one, the first 0."""
    return re.split(r"(\d+)", name if "#" in name else f"{name}#0")


def _templates(name: str) -> list[str]:
    """List a name with each of its numbers left out in turn."""
    parts = _split_at_numbers(name)
    return ["".join((*parts[:k], "*", *parts[k + 1 :])) for k in range(1, len(parts), 2)]


def _of_period(sites: Sequence[Site], kinds: Sequence[Any], period: int) -> list[Run]:
    """List the runs of blocks of `period` sites in which one and the same number goes up."""
    changes = [
        _change(sites[k].name, sites[k + period].name) if kinds[k] == kinds[k + period] else None
        for k in range(len(sites) - period)
    ]
    found, start = [], 0
    for same, group in itertools.groupby(changes, key=lambda c: c and (c.prefix, c.step)):
        changed = list(group)
        blocks = len(changed) // period
        if same and blocks:
            # The number stands still within a block, and a block begins where it moves.
            first = [c.first for c in changed if c]
            offset = next((k for k in range(period) if _is_aligned(first[k:], period)), None)
            if offset is not None:
                times = (len(changed) - offset) // period + 1
                low, step = first[offset], same[1]
                found.append(
                    Run(start + offset, period, times, same[0], low, low + step * (times - 1))
                )
        start += len(changed)
    return found


def _is_aligned(first: Sequence[int], period: int) -> bool:
    blocks = [first[k : k + period] for k in range(0, len(first) - period + 1, period)]
    return bool(blocks) and all(len(set(block)) == 1 for block in blocks)


def _change(one: str, other: str) -> _Change | None:
    """Compare two names that may differ in one number."""
    a, b = _split_at_numbers(one), _split_at_numbers(other)
    if len(a) != len(b):
        return None
    differs = [k for k, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if len(differs) != 1 or not differs[0] % 2:
        return None
    (k,) = differs
    prefix = "#" if a[k - 1].endswith("#") else "".join(a[:k])
    return _Change(prefix, int(b[k]) - int(a[k]), int(a[k]))


def _shorten_to_alike(sites: Sequence[Site], number: Mapping[str, int], run: Run) -> Run | None:
    """Shorten a run to the blocks that are fed alike, each by itself or the one before."""

    def list_feeds(block: int, k: int) -> frozenset[Any]:
        low = run.start + block * run.length
        found = set()
        for name in sites[low + k].upstream:
            i = number[name]
            inside = low - run.length * (block > 0) <= i < low + run.length
            found.add(("here", i - low) if inside else ("outside", i))
        return frozenset(found)

    def list_inner_feeds(block: int, k: int) -> frozenset[Any]:
        return frozenset(f for f in list_feeds(block, k) if f[0] == "here" and f[1] >= 0)

    each = range(run.length)
    if any(list_inner_feeds(0, k) != list_inner_feeds(1, k) for k in each):
        return None
    times = 2
    while times < run.times and all(list_feeds(times, k) == list_feeds(1, k) for k in each):
        times += 1
    step = (run.last - run.first) // (run.times - 1)
    return run._replace(times=times, last=run.first + step * (times - 1))


def share_prefix(paths: Sequence[str]) -> str:
    """Find the leading segments that all paths share, the last segment left out.

    Args:
        paths: Paths, at least one.

    Returns:
        The prefix with a trailing slash, or nothing.

    Example:
        >>> share_prefix(["params/a/kernel", "params/b/kernel"])
        'params/'
    """
    split = [path.split("/")[:-1] for path in paths]
    shared = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*split, strict=False))
    return "".join(f"{same[0]}/" for same in shared)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Shorten paths: without the prefix that all share, and without `kernel` where it says nothing.

    Args:
        paths: Paths, at least one.

    Returns:
        `{path: short}`; different paths stay different.

    Example:
        >>> short_names(["params/up/kernel", "params/down/kernel"])
        {'params/up/kernel': 'up', 'params/down/kernel': 'down'}
    """
    plain = {path: re.sub(r"/(kernel|weight|embedding)$", "", path) for path in paths}
    counts = Counter(plain.values())
    short = {path: one if counts[one] == 1 else path for path, one in plain.items()}
    prefix = share_prefix(list(short.values()))
    return {path: one.removeprefix(prefix) for path, one in short.items()}
