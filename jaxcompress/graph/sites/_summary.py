"""`summary`: the table that a person wants first, every leaf in it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.sites._graph import Graph, describe_stored
from jaxcompress.graph.sites._sites import Axes
from jaxcompress.graph.sites._trace import Traced, trace
from jaxcompress.text import grid, render_plain, write_scaled

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site, one leaf outside all sites, or several of them under one prefix.

    Attributes:
        name: The site's name, the leaf's path, or the prefix.
        what: What fn does with it: the primitive of a site, `in add, mul` for other uses,
            `returned`, `not read`, or `7 rows` for several.
        axes: The leaf's axes at a site, such as `0 -> 1`: contracted, then output; with `s` for
            stacked layers, `b` for batch, `k` for a window, `?` for lookup.
        shape: The leaf's shape; empty for several.
        dtype: The leaf's dtype, or `mixed`.
        params: Entries; a leaf with several sites counts at the first.
        param_bytes: Bytes as stored, counted likewise.
        flops: Over all repeats, 2 per multiply-add.
        bytes: Over all repeats: weight, activation and result; the leaf alone if it has no site.
        repeats: How often it runs in one call.
    """

    name: str
    what: str
    axes: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    params: int = 0
    param_bytes: int = 0
    flops: int = 0
    bytes: int = 0
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A function at a glance. Print it with `print` or `rich.print`.

    Attributes:
        rows: Sites and other leaves, in the order of params; contractions without a leaf last.
        params: Entries of all leaves.
        param_bytes: Bytes of all leaves as stored.
        flops: Of all contractions; a `cond` counts its costliest branch, so that the rows may
            add up to more.
        bytes: Bytes that all rows move.
        graph: The graph that it was made from.
    """

    rows: tuple[Row, ...]
    params: int
    param_bytes: int
    flops: int
    bytes: int
    graph: Graph = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain values.

        Returns:
            A mapping that `json.dumps` takes; every row has its share of params, FLOPs and bytes,
            from 0 to 1.
        """
        totals = {key: getattr(self, key) for key in ("params", "param_bytes", "flops", "bytes")}
        rows = []
        for row in self.rows:
            shares = {
                f"{key}_share": _find_fraction(getattr(row, key), totals[key]) for key in _SHARED
            }
            rows.append({**vars(row), "shape": list(row.shape), **shares})
        return {**totals, "rows": rows}

    def __rich__(self) -> "rich.table.Table":
        import rich.text

        table = grid(
            ["site or leaf", "what", "axes", "shape", "dtype"],
            ["times", "params", "share", "FLOPs", "share", "bytes", "share"],
        )
        for row in self.rows:
            cells = [rich.text.Text(row.name), row.what, row.axes]
            cells += ["×".join(map(str, row.shape)), row.dtype, str(row.repeats)]
            for key in _SHARED:
                value, whole = getattr(row, key), getattr(self, key)
                cells += [write_scaled(value, ""), f"{100 * _find_fraction(value, whole):.1f} %"]
            table.add_row(*cells)
        table.add_section()
        totals = [cell for key in _SHARED for cell in (write_scaled(getattr(self, key), ""), "")]
        table.add_row("all", *[""] * 5, *totals)
        return table

    def __str__(self) -> str:
        return render_plain(self)


_SHARED = ("params", "flops", "bytes")


def _find_fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def summary(
    fn: Callable[..., Any] | Traced,
    params: tree.Params = None,
    *inputs: Any,
    depth: int | None = None,
    **kwargs: Any,
) -> Summary:
    """List every leaf of params with what fn does with it, and what that costs.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced`, without arguments.
        params: Any pytree of arrays; shapes are enough.
        *inputs: fn's other arguments; shapes are enough.
        depth: Sum up leaves whose paths agree in so many segments, so that a deep model fits a
            screen; `None` lists each.
        **kwargs: fn's keyword arguments.

    Returns:
        The summary; `as_dict()` has the shares as numbers, `report.plot_graph` draws it.

    Raises:
        ArgumentTypeError: As `trace`.
        ArgumentError: If depth is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
        >>> found = summary(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((7, 3)))
        >>> [(row.name, row.what, row.axes, row.flops) for row in found.rows]
        [('bias', 'in add', '', 0), ('kernel', 'dot_general', '0 -> 1', 210)]
    """
    if depth is not None and depth < 1:
        raise ArgumentError(
            "depth", got=repr(depth), expected="at least 1, or None", fix="Try depth=2."
        )
    graph = trace(fn, params, *inputs, **kwargs)
    rows = [row for path, leaf in graph.leaves.items() for row in _rows(graph, path, leaf)]
    if graph.elsewhere:
        rows.append(
            Row(
                name="(no leaf)",
                what=", ".join(dict.fromkeys(one.primitive for one in graph.elsewhere)),
                flops=sum(one.flops for one in graph.elsewhere),
                bytes=sum(one.bytes for one in graph.elsewhere),
                repeats=sum(one.repeats for one in graph.elsewhere),
            )
        )
    return Summary(
        rows=tuple(rows if depth is None else _fold_prefixes(rows, depth)),
        params=tree.count(params),
        param_bytes=tree.nbytes(params),
        flops=graph.flops,
        bytes=sum(row.bytes for row in rows),
        graph=graph,
    )


def _rows(graph: Graph, path: str, leaf: Any) -> list[Row]:
    leaf_row = Row(
        name=path,
        what=_use(graph, path),
        shape=tuple(leaf.shape),
        dtype=describe_stored(leaf),
        params=math.prod(leaf.shape),
        param_bytes=tree.nbytes(leaf),
        bytes=tree.nbytes(leaf) if path not in graph.unreached else 0,
        repeats=max((use.repeats for use in graph.uses.get(path, ())), default=1),
    )
    sites = graph.sites_of(path)
    if not sites:
        return [leaf_row]
    return [
        replace(
            leaf_row,
            name=site.name,
            what=site.primitive,
            axes=_write_axes(site.axes),
            params=0 if k else leaf_row.params,
            param_bytes=0 if k else leaf_row.param_bytes,
            flops=site.flops,
            bytes=site.bytes,
            repeats=site.repeats,
        )
        for k, site in enumerate(sites)
    ]


def _use(graph: Graph, path: str) -> str:
    if path in graph.uses:
        return "in " + ", ".join(dict.fromkeys(use.primitive for use in graph.uses[path]))
    return "returned" if path in graph.returned else "not read"


def _write_axes(axes: Axes) -> str:
    """Write axes by role, `s0 k0,1 1 -> 2`: letters for stacked, batch, window and lookup."""

    def listed(letter: str, several: tuple[int, ...]) -> list[str]:
        return [letter + ",".join(map(str, several))] if several else []

    inside = [
        *listed("s", axes.stacked),
        *listed("b", axes.batch),
        *listed("k", axes.spatial),
        *listed("?", axes.lookup),
        *listed("", axes.contract),
    ]
    return " ".join([*inside, "->", *listed("", axes.output)])


def _fold_prefixes(rows: Iterable[Row], depth: int) -> list[Row]:
    """Sum up the rows of each prefix of so many path segments."""
    under: dict[str, list[Row]] = {}
    for row in rows:
        under.setdefault("/".join(row.name.split("/")[:depth]), []).append(row)
    return [_sum_rows(prefix, several) for prefix, several in under.items()]


def _sum_rows(prefix: str, rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    dtypes = {row.dtype for row in rows}
    return Row(
        name=prefix,
        what=f"{len(rows)} rows",
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        params=sum(row.params for row in rows),
        param_bytes=sum(row.param_bytes for row in rows),
        flops=sum(row.flops for row in rows),
        bytes=sum(row.bytes for row in rows),
        repeats=max(row.repeats for row in rows),
    )
