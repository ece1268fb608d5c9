"""`groups`: the units of a function that can be removed, from the labels of its indices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.sites import describe_array, number_repeats
from jaxcompress.structured._certificate import capture_exactly
from jaxcompress.structured._groups import Group, Groups, Member, Role, check_keys, matches_group

_WORDS: dict[Role, str] = {
    "channels": "channels of a convolution",
    "embedding": "features of an embedding",
    "experts": "experts",
    "head size": "features of each head",
    "heads": "attention heads",
    "hidden": "hidden units",
    "residual": "residual stream",
    "state": "state of a recurrence",
}


def groups(
    fn: Callable[..., Any],
    params: tree.Params,
    *inputs: Any,
    round_to: int | Mapping[str, int] = 1,
    whole_heads: bool = True,
    **kwargs: Any,
) -> Groups:
    """Find which slices of which leaves must shrink together, in any function.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; shapes are enough.
        *inputs: fn's other arguments; shapes are enough.
        round_to: Numbers of units to keep are multiples of it, such as 8, or 128 on a TPU; or
            `{glob over names of groups, or role: multiple}`, the first match counting. In features:
            a head of 64 features is 64 of a multiple.
        whole_heads: Keep the size of heads and, where several query heads share a key head, their
            ratio; heads go whole, with the queries that share them.
        **kwargs: fn's keyword arguments.

    Returns:
        The groups by name; `.frozen` has those that cannot shrink, with the reasons.

    Raises:
        ArgumentTypeError: If fn cannot be traced.
        ArgumentError: If round_to is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> found = groups(fn, {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}, jnp.ones((1, 3)))
        >>> [(g.name, g.role, g.size, len(g.members)) for g in found.values()]
        [('up', 'hidden', 8, 2)]
        >>> found.frozen["down"].frozen
        'it is axis 1 of output 0'
    """
    traced = capture_exactly(fn, params, inputs, kwargs)
    shapes = {path: jax.tree.map(describe_array, leaf) for path, leaf in traced.leaves.items()}
    dims = graph.dims(replace(traced, leaves=shapes))  # it holds no weights
    found = _Finder(dims, whole_heads).groups()
    named = _name_groups(found)
    if not isinstance(round_to, int):
        check_keys("round_to", round_to, named)
    rounded = [replace(group, round_to=_multiple(group, round_to)) for group in named]
    return Groups(
        prunable={group.name: group for group in rounded if group.frozen is None},
        frozen={group.name: group for group in rounded if group.frozen is not None},
        leaves={
            path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            for path, leaf in shapes.items()
        },
        dims=dims,
        fn=fn,
        like=jax.tree.map(describe_array, params),
        inputs=jax.tree.map(describe_array, inputs),
        kwargs=jax.tree.map(describe_array, kwargs),
    )


def _multiple(group: Group, round_to: int | Mapping[str, int]) -> int:
    pairs = {"*": round_to} if isinstance(round_to, int) else round_to
    for key, value in pairs.items():
        if value < 1:
            raise ArgumentError(
                "round_to",
                got=repr(value),
                expected="a positive multiple",
                fix="1 leaves all free.",
            )
        if matches_group(key, group):
            features = max((m.indices.shape[1] for m in group.members), default=1)
            return max(1, value // features if group.role == "heads" else value)
    return 1


def _name_groups(found: Sequence[Group]) -> list[Group]:
    """Give groups unique names; those that can shrink come first."""
    ordered = sorted(found, key=lambda group: group.frozen is not None)
    names = number_repeats([group.name for group in ordered])
    return [replace(group, name=name) for group, name in zip(ordered, names, strict=True)]


@dataclass(frozen=True)
class _Leaf:
    """What the sites of a leaf say of its axes."""

    output: frozenset[int]
    contract: frozenset[int]
    batch: frozenset[int]
    lookup: frozenset[int]
    spatial: bool


class _Finder:
    def __init__(self, dims: graph.Dims, whole_heads: bool):
        self._dims, self._whole = dims, whole_heads
        self._paths = list(dims.leaves)
        self._sites = {path: self._of(path) for path in self._paths}
        self._scored = self._attention()

    def _of(self, path: str) -> _Leaf:
        sites = [f.site for f in self._dims.traced.record.sites if f.site.path == path]
        join = lambda name: frozenset(k for s in sites for k in getattr(s.axes, name))
        spatial = any(s.axes.spatial for s in sites)
        return _Leaf(join("output"), join("contract"), join("batch"), join("lookup"), spatial)

    def _attention(self) -> dict[str, np.ndarray]:
        """Flag labels by contractions without a leaf: heads are shared, their features are not."""
        dims = self._dims
        in_leaf = np.zeros(len(dims.labels), bool)
        for axes in dims.leaves.values():
            for axis in axes:
                in_leaf[dims.labels.members(axis)] = True
        at_site = {found.position for found in dims.traced.record.sites}
        flags = {name: np.zeros(len(dims.labels), bool) for name in ("heads", "head size")}
        outer = np.zeros(len(dims.labels), bool)
        for product in dims.products:
            if product.position in at_site or not product.summed:  # or it only scales
                continue
            rows = [dims.labels.rows(axis) for axis in product.axes]
            mine = [np.unique(row[(row > 0) & in_leaf[row]]) for row in rows]
            if not any(len(labels) for labels in mine[: product.batch]):
                continue
            for labels in mine[: product.batch]:
                flags["heads"][labels] = True
            others, end = mine[product.batch :], len(mine) - product.batch - product.summed
            if self._scores(others[end:], outer):  # each query with each key
                for labels in others[:end]:
                    outer[labels] |= ~flags["head size"][labels]
            for labels in others:
                flags["head size"][labels] = ~outer[labels]
        flags["heads"] |= self._flag_queries(flags["heads"], outer)
        return flags

    def _scores(self, summed: Sequence[np.ndarray], outer: np.ndarray) -> bool:
        """Tell whether a contraction sums over features of heads, rather than over positions."""
        reasons = self._dims.reasons
        return any(((reasons[labels] == "") & ~outer[labels]).any() for labels in summed)

    def _flag_queries(self, heads: np.ndarray, outer: np.ndarray) -> np.ndarray:
        """Flag the queries that share a key head: numbered beside heads along some leaf's axis."""
        flags = np.zeros(len(heads), bool)
        for axes in self._dims.leaves.values():
            for axis in axes:
                rows = self._dims.labels.rows(axis)
                rows = rows[(heads[rows] & (rows > 0)).any(axis=1)]
                flags[rows[rows > 0]] = True
        return flags & outer

    def groups(self) -> list[Group]:
        label, code, position = self._occurrences()
        if not len(label):
            return []
        units, inverse = np.unique(label, return_inverse=True)
        kinds = self._kinds(units, inverse.reshape(-1), code)
        found = []
        mine = kinds[inverse.reshape(-1)]
        order = np.argsort(mine, kind="stable")
        ends = np.cumsum(np.bincount(mine))
        for here in np.split(order, ends[:-1]):
            group = self._group(label[here], code[here], position[here])
            if group.size == 1 and group.frozen is None:
                group = replace(group, frozen="all its indices go together")
            found.append(group)
        order = {path: k for k, path in enumerate(self._paths)}
        found.sort(
            key=lambda g: (order[g.name], g.members[0].axis, int(g.members[0].indices[0, 0]))
        )
        return found

    def _occurrences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """List where labels are in leaves: the label, leaf axis and column, and the index."""
        labels, codes, positions = [], [], []
        self._codes: list[tuple[str, int]] = []
        for path, axes in self._dims.leaves.items():
            for k, axis in enumerate(axes):
                rows = self._dims.labels.rows(axis)
                for column in rows.T:
                    there = np.flatnonzero(column > 0)
                    labels.append(column[there])
                    codes.append(np.full(len(there), len(self._codes)))
                    positions.append(there)
                    self._codes.append((path, k))
        if not labels:
            none = np.zeros(0, int)
            return none, none, none
        return np.concatenate(labels), np.concatenate(codes), np.concatenate(positions)

    def _kinds(self, units: np.ndarray, inverse: np.ndarray, code: np.ndarray) -> np.ndarray:
        """Number the units so that those which occur equally often in the same axes are alike."""
        pairs, counts = np.unique(
            inverse.astype(np.int64) * len(self._codes) + code, return_counts=True
        )
        unit, where = np.divmod(pairs, len(self._codes))
        self._axes_of = np.zeros(len(self._dims.labels), np.int32)
        self._axes_of[units] = np.bincount(unit, minlength=len(units))
        reasons = self._dims.reasons[units].astype(str)
        _, reason = np.unique(reasons, return_inverse=True)
        layer = self._dims.layers[units]
        random = np.random.default_rng(0).integers(1, 2**63, len(self._codes), dtype=np.uint64)
        key = np.zeros(len(units), np.uint64)
        np.add.at(
            key, unit, random[where] * (counts.astype(np.uint64) * np.uint64(2) + np.uint64(1))
        )
        table = np.stack([key.view(np.int64), reason.reshape(-1), layer], axis=1)
        return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)

    def _group(self, label: np.ndarray, code: np.ndarray, position: np.ndarray) -> Group:
        dims = self._dims
        by_axis: dict[tuple[str, int], np.ndarray] = {}
        for number in np.unique(code):
            key = self._codes[number]
            there = np.flatnonzero(code == number)
            by_axis[key] = np.concatenate([by_axis.get(key, there[:0]), there])
        level = int(dims.layers[label[0]]) - 1
        if level >= 0 and not self._is_even(np.unique(label)):
            level = -1
        members = []
        for (path, axis), there in by_axis.items():
            site = self._sites[path]
            # One leaf can be both, such as a tied embedding or a square recurrent matrix.
            produced = axis in site.output or (bool(site.lookup) and axis not in site.lookup)
            beside = dims.layer_axis(dims.leaves[path], level) if level >= 0 else None
            members.append(
                (Member(
                    path=path, axis=axis, indices=np.zeros((0, 0), int),
                    produces=produced, reads=axis in site.contract,
                    layers=() if beside is None else (beside,),
                ), there)
            )  # fmt: skip
        members.sort(key=lambda pair: not pair[0].produces)
        first = members[0][1]
        order = label[first][np.argsort(position[first], kind="stable")]
        order = order[np.sort(np.unique(order, return_index=True)[1])]
        placed = [
            replace(member, indices=_by_unit(order, label[there], position[there]))
            for member, there in members
        ]
        role = self._role(label[0], placed)
        return Group(
            name=placed[0].path,
            size=len(order),
            members=tuple(placed),
            role=role,
            description=self._describe(role, placed),
            layers=() if level < 0 else (dims.levels[level].length,),
            frozen=self._frozen(label[0], role, placed),
            labels=order,
        )

    def _is_even(self, units: np.ndarray) -> bool:
        """Tell whether each part of an axis that is sliced off has as much of every unit.

        Then layers may keep different units, and slices are still as long in one as in another.
        """
        for cut in self._dims.cuts:
            members = self._dims.labels.members(cut)
            counts = np.bincount(members, minlength=len(self._dims.labels))[units]
            if len(np.unique(counts)) > 1:
                return False
        return True

    def _frozen(self, label: int, role: Role, members: Sequence[Member]) -> str | None:
        if reason := str(self._dims.reasons[label]):
            return reason
        if not any(member.produces or member.reads for member in members):
            return "no contraction makes or reads it"
        if self._whole and role == "head size":
            return "heads are kept whole"
        if self._whole and role == "heads" and self._shares(label, members):
            return "the number of query heads for each key head is kept"
        return None

    def _shares(self, label: int, members: Sequence[Member]) -> bool:
        """Tell whether units are the queries of each key head: always beside another head."""
        heads = self._scored["heads"]
        for member in members:
            rows = self._dims.labels.rows(self._dims.leaves[member.path][member.axis])
            mine = rows[(rows == label).any(axis=1)]
            if len(mine) and (heads[mine] & (mine >= 0) & (mine != label)).any():
                # Of two labels of heads, the one with fewer leaves is the queries'.
                others = np.unique(mine[heads[mine] & (mine >= 0) & (mine != label)])
                return bool(self._axes_of[label] < self._axes_of[others[0]])
        return False

    def _role(self, label: int, members: Sequence[Member]) -> Role:
        if any(m.axis in self._sites[m.path].batch for m in members):
            return "experts"
        if self._scored["heads"][label]:
            return "heads"
        if self._scored["head size"][label]:
            return "head size"
        producers = {m.path for m in members if m.produces}
        stacked = any(
            self._dims.layer_axis(self._dims.leaves[m.path], k) is not None
            for m in members
            for k in range(len(self._dims.levels))
        )
        if self._dims.carried[label] and not stacked:
            return "state"
        if self._dims.summed[label] and (len(producers) > 1 or stacked):
            return "residual"
        if all(self._sites[path].lookup for path in producers) and producers:
            return "embedding"
        if any(self._sites[m.path].spatial for m in members if m.produces):
            return "channels"
        return "hidden"

    def _describe(self, role: Role, members: Sequence[Member]) -> str:
        made = [m.path for m in members if m.produces]
        read = [m.path for m in members if m.reads]
        arrow = " -> ".join(_write_few(paths) for paths in (made, read) if paths)
        return f"{_WORDS[role]}: {arrow or _write_few([m.path for m in members])}"


def _write_few(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + more


def _by_unit(order: np.ndarray, label: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Give (size, m): the positions of each unit, in order."""
    place = np.argsort(order)
    unit = place[np.searchsorted(order[place], label)]
    by_unit = np.lexsort((position, unit))
    return position[by_unit].reshape(len(order), -1)
