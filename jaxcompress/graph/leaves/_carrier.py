"""Running a function on special leaves: by their parts where a site takes them, else as arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import Array

from jaxcompress import tree
from jaxcompress.errors import JaxCompressError, SelectionError, StructureError
from jaxcompress.graph.leaves._parted import Parted, follow_move, slice_node
from jaxcompress.graph.program import CLOSED, Cells, Equation, Position, Visit
from jaxcompress.graph.sites import SitesAt, capture_call, execute_plan, make_plan


@dataclass(frozen=True, kw_only=True)
class LeafUse:
    """What was done in one place where a special leaf is read.

    Attributes:
        path: The leaf's path.
        site: The name of the site, as in `graph.trace`; `None` for a use outside any.
        how: What was run, in the words of the leaf's kind; `LeafKind.converted` where the array
            was made.
        why: Why the array was made; empty where it was not.
    """

    path: str
    site: str | None
    how: str
    why: str = ""


class SiteResult(NamedTuple):
    """What a kind of leaf has done at a site.

    Attributes:
        result: The result of the equation.
        how: What was run.
        why: Why nothing better was.
        filled: Cells that were filled, by the names of sites, if any.
    """

    result: Array
    how: str
    why: str = ""
    filled: Cells | None = None


SiteRule: TypeAlias = Callable[[Equation, Sequence[Any], int], SiteResult | str]
"""`(equation, operands, number of the node among them) -> result`, or why it needs the array."""


class Converted(NamedTuple):
    """A leaf that cannot be taken through fn.

    Attributes:
        array: The array that it stands for.
        why: Why, in words.
    """

    array: Array
    why: str


@dataclass(frozen=True, kw_only=True)
class LeafKind:
    """What `run_leaves` has to know of a kind of special leaf.

    Attributes:
        leaf_type: The type of such leaves, such as `QArray`; they have `shape` and `dtype`.
        start: `(leaf, path) -> node`, what fn's variable holds of the leaf at first.
        run_site: Runs a site one of whose operands is a node.
        converted: What `LeafUse.how` is where the array was made.
        adjective: What such leaves are, such as "quantized", for messages.
        makers: The functions that make such leaves, for messages.
        fills: Whether `run_site` fills cells.
    """

    leaf_type: type
    start: Callable[[Any, str], Parted | Converted]
    run_site: SiteRule
    converted: str
    adjective: str
    makers: str
    fills: bool = False


class LeafRun(NamedTuple):
    """What `run_leaves` returns.

    Attributes:
        outputs: fn's outputs.
        filled: The cells that `LeafKind.run_site` filled.
        uses: What was done in each place, in fn's order.
    """

    outputs: Any
    filled: Cells
    uses: tuple[LeafUse, ...]


def run_leaves(
    kind: LeafKind, fn: Callable[..., Any], params: tree.Params, inputs: Any, kwargs: Any
) -> LeafRun:
    """Run fn on params with special leaves, by their parts wherever they can go.

    fn is traced on the arrays that the leaves stand for, and run with nodes in their place: they
    are transposed, reshaped and sliced as fn does its arrays, through `jit`, `checkpoint`, `scan`,
    `cond` and `while`, until a site is reached. Elsewhere, and at the border of functions with
    their own differentiation rule, the array is made.

    Args:
        kind: What there is to know of the leaves.
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Params with such leaves.
        inputs: A tuple of fn's other arguments.
        kwargs: Its keyword arguments.

    Returns:
        fn's outputs, and what was done where.

    Raises:
        SelectionError: If params have no such leaf.
        StructureError: If fn does not run on the shapes that they stand for.

    Example:
        A matrix that is a column times a row:

        >>> import functools
        >>> from dataclasses import replace
        >>> import jax.numpy as jnp
        >>> from jaxcompress.graph.leaves import LeafKind, Parted, SiteResult, run_leaves
        >>> @functools.partial(
        ...     jax.tree_util.register_dataclass,
        ...     data_fields=("column", "row"),
        ...     meta_fields=("path", "split"),
        ... )
        ... @dataclass(frozen=True, eq=False)
        ... class Outer(Parted):
        ...     column: Any  # (in, 1)
        ...     row: Any  # (1, out)
        ...     path: str = ""
        ...     split: Any = (1, 1)
        ...     dtype = jnp.dtype("float32")
        ...
        ...     def array(self):
        ...         return (self.column * self.row).reshape(self.shape)
        >>> def run_site(equation, operands, operand):
        ...     x, node = operands
        ...     if operand != 1 or node.column.shape[1] != 1:
        ...         return "only x @ W is known"
        ...     return SiteResult((x @ node.column) * node.row, "outer")
        >>> kind = LeafKind(
        ...     leaf_type=Outer,
        ...     start=lambda leaf, path: replace(leaf, path=path),
        ...     run_site=run_site,
        ...     converted="as an array",
        ...     adjective="outer",
        ...     makers="Outer",
        ... )
        >>> fn = lambda params, x: x @ params["w"] + (x @ params["w"].T).sum() + params["w"].sum()
        >>> params = {"w": Outer(jnp.ones((2, 1)), jnp.ones((1, 2)))}
        >>> outputs, _, uses = run_leaves(kind, fn, params, (jnp.ones((1, 2)),), {})
        >>> outputs
        Array([[10., 10.]], dtype=float32)
        >>> [(use.site, use.how, use.why) for use in uses]  # doctest: +NORMALIZE_WHITESPACE
        [('w', 'outer', ''),
         ('w#1', 'as an array', 'only x @ W is known'),
         (None, 'as an array', 'reduce_sum takes arrays')]
    """
    run = _LeafCarrier(kind)
    started = run.start(params)
    try:
        traced = capture_call(fn, run.stand_ins(params, started), inputs, kwargs, prune=True)
    except JaxCompressError:
        raise
    except (TypeError, ValueError) as error:
        raise _explain_untraced(error, kind, run.leaves) from error
    # Flat, so that other leaves of several arrays are passed as those.
    args = jax.tree.leaves((started, inputs, kwargs), is_leaf=lambda x: isinstance(x, Parted))
    plan = make_plan(traced, run.match, fills=kind.fills, carrier=run)
    outputs, filled = execute_plan(traced, plan, args, {})
    return LeafRun(outputs, filled, tuple(dict.fromkeys(run.uses)))


def list_uses(
    kind: LeafKind, fn: Callable[..., Any], params: tree.Params, inputs: Any, kwargs: Any
) -> tuple[LeafUse, ...]:
    """List what `run_leaves` does in each place; nothing is computed.

    Args:
        kind: What there is to know of the leaves.
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Params with such leaves (shapes are enough).
        inputs: A tuple of fn's other arguments.
        kwargs: Its keyword arguments.

    Returns:
        One entry per place, in fn's order.

    Raises:
        SelectionError: As `run_leaves`.
        StructureError: As `run_leaves`.
    """
    found: list[LeafUse] = []

    def run(*args: Any) -> Any:
        outputs, _, uses = run_leaves(kind, fn, *args)
        found.extend(uses)
        return outputs

    jax.eval_shape(run, params, inputs, kwargs)
    return tuple(found)


@dataclass
class _LeafCarrier:
    """One call: the carrier of its nodes, and a log of what was done with them."""

    kind: LeafKind
    leaves: dict[str, Any] = field(default_factory=dict)
    uses: list[LeafUse] = field(default_factory=list)

    def is_leaf(self, x: Any) -> bool:
        return isinstance(x, self.kind.leaf_type | tree.LeafNode)

    def start(self, params: tree.Params) -> Any:
        """Put nodes in the places of special leaves."""

        def start(keypath: Any, leaf: Any) -> Any:
            if not isinstance(leaf, self.kind.leaf_type):
                return leaf
            path = tree.path_str(keypath)
            self.leaves[path] = leaf
            node = self.kind.start(leaf, path)
            if not isinstance(node, Converted):
                return node
            self.log(path, None, self.kind.converted, node.why)
            return node.array

        started = jax.tree_util.tree_map_with_path(start, params, is_leaf=self.is_leaf)
        if not self.leaves:
            raise SelectionError(
                "params",
                got=f"params without any {self.kind.leaf_type.__name__}",
                expected=f"params with {self.kind.adjective} leaves",
                fix=f"Make them with {self.kind.makers}.",
            )
        return started

    def stand_ins(self, params: tree.Params, started: Any) -> Any:
        """Describe the arrays that special leaves stand for, in their places."""

        def describe(leaf: Any, node: Any) -> Any:
            if not isinstance(leaf, self.kind.leaf_type):
                return leaf
            where = node.placement() if isinstance(node, Parted) else None
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(describe, params, started, is_leaf=self.is_leaf)

    def match(self, program: Any, sites: SitesAt) -> dict[Position, Visit]:
        """Choose the sites of special leaves."""
        return {
            position: self.visit
            for position, found in sites.items()
            if any(s.path in self.leaves and not {*s.scope} & CLOSED for s in found)
        }

    def visit(
        self, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        nodes = [k for k, x in enumerate(operands) if isinstance(x, Parted)]
        if not nodes:  # made an array on the way
            return [equation.bind(*operands)], {}
        first, *others = nodes
        operands = list(operands)
        for k in others:
            why = f"a contraction of two {self.kind.adjective} leaves"
            operands[k] = self.array(operands[k], why)
        moved = follow_move(equation, operands)  # a slice at a traced index looks rows up
        if moved is not None:
            return moved, {}
        node = operands[first]
        site = next((s.name for s in equation.sites if s.path == node.path), None)
        done = self.kind.run_site(equation, operands, first)
        if isinstance(done, str):
            self.log(node.path, site, self.kind.converted, done)
            operands[first] = node.array()
            return [equation.bind(*operands)], {}
        self.log(node.path, site, done.how, done.why)
        return [done.result], done.filled or {}

    def log(self, path: str, site: str | None, how: str, why: str) -> None:
        self.uses.append(LeafUse(path=path, site=site, how=how, why=why))

    # --- what a carrier does; see `graph.program.Carrier` ---

    def follow(self, equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
        return follow_move(equation, operands)

    def sliced(self, node: Any) -> Any:
        return slice_node(node)

    def array(self, node: Any, why: str) -> Any:
        self.log(node.path, None, self.kind.converted, f"{why} takes arrays")
        return node.array()


def _explain_untraced(error: Exception, kind: LeafKind, leaves: dict[str, Any]) -> StructureError:
    """Say that fn could not be run on params: they may be another model's."""
    shapes = [f"{path!r} {tuple(leaf.shape)}" for path, leaf in leaves.items()]
    name = kind.leaf_type.__name__
    return StructureError(
        "params",
        got=f"a {name} on which fn raises {type(error).__name__}: {str(error).splitlines()[0]}",
        expected="params and inputs of fn's own model",
        fix=f"Use {kind.makers} on the params of this fn; those here have {', '.join(shapes[:4])}.",
    )
