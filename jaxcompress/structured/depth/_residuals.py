"""Residual sums `x + f(x)` in a flow, those that only look like one, and names for them."""

import collections
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxcompress import tree
from jaxcompress.graph import Traced
from jaxcompress.graph.program import Position, scan_counts
from jaxcompress.graph.sites import number_repeats
from jaxcompress.structured.depth._flow import NO_VALUE, Flow, Node, bits, flow_of


@dataclass(frozen=True, eq=False)
class Residual:
    """A sum `x + f(x)`.

    Attributes:
        flow: Where it is.
        node: The addition.
        skip: Which operand is x.
        start: The value x that f reads; a stream that f does not see may have been added since.
        inner: The values inside f.
        sites: Numbers of the sites inside f.
        paths: The leaves of these sites.
        stack: Lengths of the scans around it, outermost first.
        scans: The positions of these scans.
    """

    flow: Flow
    node: Node
    skip: int
    start: int
    inner: frozenset[int]
    sites: tuple[int, ...]
    paths: tuple[str, ...]
    stack: tuple[int, ...]
    scans: tuple[Position, ...]


@dataclass(frozen=True, eq=False)
class Rejected:
    """A sum of two branches of one input that is no `x + f(x)`, and why."""

    paths: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Stack:
    """A scan over the rows of leaves whose body has residual sums: a stack of layers.

    Attributes:
        node: The scan.
        length: How many layers there are.
        paths: The leaves of which each layer reads a row.
        carry: Which of the carried values the layers pass on.
    """

    node: Node
    length: int
    paths: tuple[str, ...]
    carry: int


def residuals_of(traced: Traced) -> tuple[list[Residual], list[Rejected], list[Stack]]:
    """Find the residual sums of a captured call, in the order in which it runs."""
    paths = [found.site.path for found in traced.record.sites]
    found: list[Residual] = []
    rejected: list[Rejected] = []
    stacks: list[Stack] = []
    for one, scans in _flows(flow_of(traced), ()):
        stack = tuple(scan.eqn.params["length"] for scan in scans)
        mine = list(_find_residuals(one, paths, stack, tuple(scan.position for scan in scans)))
        found += mine
        inside = set().union(*(r.inner for r in mine))
        rejected += _find_lookalikes(one, paths, mine, inside)
        if mine and len(scans) == 1 and (layers := _describe_stack(scans[0], mine[0])):
            stacks.append(layers)
    found.sort(key=lambda r: r.node.position)
    return found, rejected, stacks


def _flows(flow: Flow, scans: tuple[Node, ...]) -> Iterator[tuple[Flow, tuple[Node, ...]]]:
    yield flow, scans
    for node in flow.nodes:
        if node.body is not None:
            yield from _flows(node.body, (*scans, node))


def _find_residuals(
    flow: Flow, paths: Sequence[str], stack: tuple[int, ...], scans: tuple[Position, ...]
) -> Iterator[Residual]:
    """Find the sums of a flow one operand of which the other is computed from, by way of sites.

    In `x + attention(x) + mlp(x)` the second sum adds to a stream that holds x: f is computed
    from what the stream was before.
    """
    stream: dict[int, tuple[int, ...]] = {}  # result of a sum -> what it was before, latest first
    for node in flow.nodes:
        if node.name != "add":
            continue
        for skip in (0, 1):
            one = _find_residual(flow, node, skip, stream, paths, stack, scans)
            if one is not None:
                before = flow.root[node.operands[skip]]
                stream[node.results[0]] = (before, *stream.get(before, ()))
                yield one
                break


def _find_residual(
    flow: Flow,
    node: Node,
    skip: int,
    stream: dict[int, tuple[int, ...]],
    paths: Sequence[str],
    stack: tuple[int, ...],
    scans: tuple[Position, ...],
) -> Residual | None:
    kept, branch = node.operands[skip], node.operands[1 - skip]
    if NO_VALUE in (kept, branch) or flow.shapes[kept] != flow.shapes[node.results[0]]:
        return None
    root = flow.root[kept]
    for start in (root, *stream.get(root, ())):
        if flow.varies(start) and start != flow.root[branch] and flow.above[branch] >> start & 1:
            inner = flow.list_between(start, branch)
            sites = tuple(flow.sites_of(inner))
            if not sites:
                return None
            leaves = tuple(dict.fromkeys(paths[k] for k in sites))
            return Residual(flow, node, skip, start, frozenset(inner), sites, leaves, stack, scans)
    return None


def _find_lookalikes(
    flow: Flow, paths: Sequence[str], found: Sequence[Residual], inside: set[int]
) -> Iterator[Rejected]:
    """Find sums of two branches that part at one value, where neither is that value."""
    sums = {one.node.position for one in found}
    for node in flow.nodes:
        if node.name != "add" or node.position in sums or node.results[0] in inside:
            continue
        if NO_VALUE in node.operands:
            continue
        first, second = node.operands
        common = flow.above[first] & flow.above[second] & flow.varying
        if not common:
            continue
        start = bits(common)[-1]
        sites = [flow.sites_of(flow.list_between(start, end)) for end in (first, second)]
        if first == second or not any(sites):
            continue
        before, after = flow.shapes[start], flow.shapes[node.results[0]]
        if before != after:
            reason = f"its shortcut changes shape, from {before} to {after}"
        elif all(sites):
            reason = "its shortcut contracts params, too: neither operand is its input"
        else:
            reason = "its shortcut is computed from its input, not the input itself"
        leaves = dict.fromkeys(paths[k] for k in sorted({*sites[0], *sites[1]}))
        yield Rejected(tuple(leaves), reason)


def _describe_stack(node: Node, first: Residual) -> Stack | None:
    """Describe a scan as a stack of layers, if each iteration reads rows of leaves."""
    body = first.flow
    consts, carry = scan_counts(node.eqn)
    slots = range(consts + carry, len(node.operands))
    read = {value for inner in body.nodes for value in inner.operands}
    paths = dict.fromkeys(
        path for k in slots if body.inputs[k] in read for path in sorted(body.paths[body.inputs[k]])
    )
    carried = [
        k
        for k in range(carry)
        if body.shapes[body.inputs[consts + k]] == body.shapes[first.start]
        and body.above[first.start] >> body.inputs[consts + k] & 1
    ]
    if not paths or not carried:
        return None
    return Stack(node, node.eqn.params["length"], tuple(paths), carried[0])


# --- names ----------------------------------------------------------------------------------------


def prefix_of(paths: Sequence[str]) -> tuple[str, ...]:
    """Find the longest path that all leaves lie below, as segments."""
    parents = [path.split("/")[:-1] for path in paths]
    shared = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*parents, strict=False))
    return tuple(each[0] for each in shared)


def names_of(groups: Sequence[Sequence[str]]) -> list[str]:
    """Name groups of leaves, each by what is common to its paths.

    A group that shares its prefix with another one, or that has none, is named by what lies
    below: `layers_0/gate+up+down`. What still coincides is numbered: `shared`, `shared#1`.

    Args:
        groups: Paths, group by group; those of a group in the order of their use.

    Returns:
        One name per group.

    Example:
        >>> names_of([["l/attn/q", "l/attn/k"], ["l/up/kernel", "l/down/kernel"], ["a", "b"]])
        ['l/attn', 'l/up+down', 'a+b']
    """
    prefixes = [prefix_of(paths) for paths in groups]
    names = []
    for number, (prefix, paths) in enumerate(zip(prefixes, groups, strict=True)):
        others = [p for k, p in enumerate(prefixes) if k != number]
        crowded = any(other[: len(prefix)] == prefix for other in others)
        if prefix and not crowded:
            names.append("/".join(prefix))
            continue
        below = list(dict.fromkeys(path.split("/")[len(prefix)] for path in paths))
        if len(below) > 4:
            below = [*below[:2], "...", below[-1]]
        names.append("/".join([*prefix, "+".join(below)]))
    return number_repeats(names)


def layers_of(groups: Sequence[Sequence[str]], names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Group consecutive blocks into layers.

    Blocks are one layer if their leaves share a path whose last segment has a number, as
    `blocks/3`, and they are no numbered siblings themselves, as `stage1/0` and `stage1/1`.

    Args:
        groups: The leaves of each block.
        names: The names of the blocks.

    Returns:
        `(name, numbers of blocks)`, in order; a block on its own is a layer of its own name.

    Example:
        >>> layers_of([["m_0/a/w"], ["m_0/b/w"], ["m_1/a/w"]], ["m_0/a", "m_0/b", "m_1/a"])
        [('m_0', [0, 1]), ('m_1/a', [2])]
    """
    prefixes = [prefix_of(paths) for paths in groups]
    joints = [_find_joint(a, b) for a, b in itertools.pairwise(prefixes)]
    best = [max(joints[max(k - 1, 0) : k + 1], key=len, default=()) for k in range(len(prefixes))]
    layers: list[tuple[str, list[int]]] = []
    for number, joint in enumerate(best):
        if joint and number and best[number - 1] == joint:
            layers[-1][1].append(number)
        else:
            layers.append(("/".join(joint) if joint else names[number], [number]))
    counted = collections.Counter(name for name, _ in layers)
    return [
        (name if counted[name] == 1 else "+".join(names[k] for k in numbers), numbers)
        for name, numbers in layers
    ]


def _find_joint(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """Find the path of a layer that two blocks share; `()` if there is none."""
    shared = [
        a
        for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(first, second, strict=False))
    ]
    if not shared or not re.search(r"\d", shared[-1]):
        return ()
    rest = [each[len(shared) : len(shared) + 1] for each in (first, second)]
    stems = {re.sub(r"\d+", "#", segment[0]) if segment else None for segment in rest}
    siblings = all(rest) and len(stems) == 1
    return () if siblings else tuple(shared)


def find_closest(name: str, known: Sequence[str]) -> str:
    """Write the names that are nearest to an unknown one."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
    return tree.shorten(near or list(known))
