"""`execute`: run a function on factorised leaves, contracting one factor after the other."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcompress import tree
from jaxcompress.graph import Equation
from jaxcompress.graph.leaves import LeafKind, SiteResult, list_uses, run_leaves
from jaxcompress.lowrank._contract import contract
from jaxcompress.lowrank._factors import Factors, carry_factors


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
        return run_leaves(_KIND, fn, params, inputs, kwargs).outputs

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
    return tuple(
        Place(path=use.path, site=use.site, by_factors=use.how != _KIND.converted, why=use.why)
        for use in list_uses(_KIND, fn, params, inputs, kwargs)
    )


def _run_by_factors(equation: Equation, operands: Sequence[Any], operand: int) -> SiteResult | str:
    result = contract(equation, operands, operand)
    return result if isinstance(result, str) else SiteResult(result, "by factors")


_KIND = LeafKind(
    leaf_type=Factors,
    start=carry_factors,
    run_site=_run_by_factors,
    converted="multiplied out",
    adjective="factorised",
    makers="lowrank.factorize",
)
