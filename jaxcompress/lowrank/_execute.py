"""`execute`: run a function on factorised leaves, contracting one factor after the other."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.errors import JaxCompressError, SelectionError, StructureError
from jaxcompress.graph import Equation
from jaxcompress.graph._moved import follow, sliced
from jaxcompress.graph.program import CLOSED, Cells, Position, Visit
from jaxcompress.graph.sites import SitesAt, capture_call, make_plan
from jaxcompress.graph.sites import execute as execute_plan
from jaxcompress.lowrank._contract import contract
from jaxcompress.lowrank._factors import Carried, Factors, carried, is_factors


@dataclass(frozen=True, kw_only=True)
class Place:
    """What `execute` does in one place where a factorised leaf is read.

    Attributes:
        path: The leaf's path.
        site: The name of the site, as in `graph.trace`; `None` for a use outside any.
        by_factors: Whether its factors are contracted one after the other; otherwise they are
            multiplied out.
        why: Why they are multiplied out.
    """

    path: str
    site: str | None
    by_factors: bool
    why: str = ""


def execute(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that takes params with `Factors`, and contracts them one after the other.

    fn is traced on the arrays that the factors stand for, and run with factors in their place:
    they are transposed, reshaped and sliced as fn does its arrays, through `jit`, `checkpoint`,
    `scan`, `cond` and `while`, until a site is reached. There `x @ W` becomes `(x @ L) @ R`,
    in any arrangement of axes, with experts and stacked layers apart; a convolution becomes one
    with fewer outputs and one over single positions, or three for Tucker-2. Of the two orders
    the one of fewer FLOPs is run. Elsewhere (a lookup, an elementwise use, the border of a
    function with its own differentiation rule) the factors are multiplied out, and so they are
    where that costs fewer FLOPs; `places` says where and why. The result differs from fn on
    `densify(params)` by float rounding.

    It works under `jit`, `grad`, `vmap`, `scan`, `checkpoint` and shardings. Factors learn like
    any other params. `quantize.ptq` and others take `execute(fn)` as their fn: the factors are
    then leaves like any others.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.

    Returns:
        A function of the same arguments.

    Raises:
        SelectionError: When called, if params have no `Factors`.
        StructureError: When called, if fn does not run on the shapes that they stand for.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> factors = Factors(left=jnp.ones((8, 1, 1)), right=jnp.ones((1, 8, 1)))
        >>> execute(fn)({"kernel": factors}, jnp.ones((1, 8)))
        Array([[8., 8., 8., 8., 8., 8., 8., 8.]], dtype=float32)
    """

    @functools.wraps(fn)
    def executed(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        return _Run().call(fn, params, inputs, kwargs)

    return executed


def places(
    fn: Callable[..., Any], params: tree.Params, *inputs: Any, **kwargs: Any
) -> tuple[Place, ...]:
    """List what `execute(fn)` does where it reads a factorised leaf; nothing is computed.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Params with `Factors` (shapes are enough).
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        One entry per place, in fn's order.

    Raises:
        SelectionError: If params have no `Factors`.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda params, x: x @ params["kernel"] + jnp.abs(params["kernel"]).sum()
        >>> factors = Factors(left=jnp.ones((8, 1, 1)), right=jnp.ones((1, 8, 1)))
        >>> for place in places(fn, {"kernel": factors}, jnp.ones((1, 8))):
        ...     print(place.site, place.by_factors, place.why)
        kernel True
        None False abs takes arrays
    """
    run = _Run()
    jax.eval_shape(lambda *args: run.call(fn, *args), params, inputs, kwargs)
    return tuple(dict.fromkeys(run.places))


def items(params: tree.Params) -> Iterator[tuple[str, Any]]:
    """Iterate over `(path, leaf)`, a `Factors` counting as one leaf."""
    is_leaf = lambda x: is_factors(x) or isinstance(x, tree.LeafNode)
    for keypath, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]:
        yield tree.path_str(keypath), leaf


@dataclass
class _Run:
    """One call: the carrier of its factorised leaves, and a log of what was done with them."""

    places: list[Place] = field(default_factory=list)

    def call(self, fn: Callable[..., Any], params: Any, inputs: Any, kwargs: Any) -> Any:
        factored = {path for path, leaf in items(params) if is_factors(leaf)}
        if not factored:
            raise SelectionError(
                "params",
                got="params without any Factors",
                expected="params with factorised leaves",
                fix="Make them with lowrank.factorize.",
            )
        dense = jax.tree.map(
            lambda x: _stand_in(x) if is_factors(x) else x, params, is_leaf=is_factors
        )
        try:
            traced = capture_call(fn, dense, inputs, kwargs, prune=True)
        except (TypeError, ValueError) as error:
            raise _not_traced(error, params) from error
        plan = make_plan(
            traced,
            lambda program, sites: self._visits(sites, factored),
            carrier=self,
        )
        started = jax.tree_util.tree_map_with_path(
            lambda keypath, x: carried(x, tree.path_str(keypath)) if is_factors(x) else x,
            params,
            is_leaf=is_factors,
        )
        # Flat, so that other leaves of several arrays are passed as those.
        args = jax.tree.leaves((started, inputs, kwargs), is_leaf=lambda x: isinstance(x, Carried))
        return execute_plan(traced, plan, args, {})[0]

    def _visits(self, sites: SitesAt, factored: set[str]) -> dict[Position, Visit]:
        return {
            position: self._visit
            for position, found in sites.items()
            if any(s.path in factored and not {*s.scope} & CLOSED for s in found)
        }

    def _visit(
        self, equation: Equation, operands: Sequence[Any], cells: Cells
    ) -> tuple[list, Cells]:
        nodes = [k for k, x in enumerate(operands) if isinstance(x, Carried)]
        if not nodes:  # multiplied out on the way
            return [equation.bind(*operands)], {}
        first, *others = nodes
        operands = list(operands)
        for k in others:
            operands[k] = self.array(operands[k], "a contraction of two factorised leaves")
        moved = follow(equation, operands)  # a slice at a traced index looks rows up
        if moved is not None:
            return moved, {}
        node = operands[first]
        names = [s.name for s in equation.sites if s.path == node.path]
        name = names[0] if names else None
        result = contract(equation, operands, first)
        if isinstance(result, str):
            self.places.append(Place(path=node.path, site=name, by_factors=False, why=result))
            operands[first] = node.array()
            return [equation.bind(*operands)], {}
        self.places.append(Place(path=node.path, site=name, by_factors=True))
        return [result], {}

    # --- what a carrier does; see `graph._replay.Carrier` ---

    def follow(self, equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
        return follow(equation, operands)

    def sliced(self, node: Any) -> Any:
        return sliced(node)

    def array(self, node: Any, why: str) -> Any:
        why = f"{why} takes arrays"
        self.places.append(Place(path=node.path, site=None, by_factors=False, why=why))
        return node.array()


def _not_traced(error: Exception, params: tree.Params) -> Exception:
    """Say that fn could not be run on params: they may be another model's."""
    if isinstance(error, JaxCompressError):
        return error
    shapes = [f"{path!r} {leaf.shape}" for path, leaf in items(params) if is_factors(leaf)]
    return StructureError(
        "params",
        got=f"Factors on which fn raises {type(error).__name__}: {str(error).splitlines()[0]}",
        expected="params and inputs of fn's own model",
        fix=f"Factorise the params of this fn; those here have {', '.join(shapes[:4])}.",
    )


def _stand_in(factors: Factors) -> jax.ShapeDtypeStruct:
    where = None
    if isinstance(factors.left, jax.Array):
        where = carried(factors, "").placement()
    return jax.ShapeDtypeStruct(factors.shape, factors.dtype, sharding=where)
