"""The normal form of a jaxpr over JAX versions: the only file that looks at JAX's internals.

JAX 0.10 has `ClosedJaxpr` and `Jaxpr`, JAX 0.12 one `Jaxpr` that may carry its constants; the
parameters of `scan` changed their names in between. Everything else here reads a `Program`.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax._src import config as _config
from jax._src import linear_util as lu
from jax._src import source_info_util
from jax._src.core import shaped_abstractify
from jax._src.interpreters import partial_eval
from jax._src.named_sharding import UNSPECIFIED
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Format
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import Var as Var


class Program(NamedTuple):
    """A jaxpr with its constants: results = equations applied to arguments.

    Attributes:
        invars: The arguments' variables.
        constvars: The variables of the constants.
        consts: Their values; empty for a jaxpr whose constants are operands of the construct.
        eqns: The equations, in order.
        outvars: The results: variables or literals.
    """

    invars: tuple[Any, ...]
    constvars: tuple[Any, ...]
    consts: tuple[Any, ...]
    eqns: tuple[Any, ...]
    outvars: tuple[Any, ...]


def normalize(jaxpr: Any) -> Program:
    """Bring an open or closed jaxpr of any supported JAX into the normal form."""
    inner = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
    return Program(
        invars=tuple(inner.invars),
        constvars=tuple(inner.constvars),
        consts=tuple(getattr(jaxpr, "consts", ())),
        eqns=tuple(inner.eqns),
        outvars=tuple(inner.outvars),
    )


def capture_program(
    fn: Callable[..., Any], args: Sequence[Any], *, prune: bool = False
) -> tuple[Program, Any]:
    """Trace `fn(*args)`; arguments may be abstract.

    Args:
        fn: The function.
        args: Its arguments.
        prune: Leave out what no result depends on, inside constructs too.

    Returns:
        The program over the flattened arguments, and the tree of the results' shapes.
    """
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    captured = normalize(jaxpr)
    if not prune:
        return captured, shapes
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = partial_eval.dce_jaxpr(inner, [True] * len(inner.outvars), instantiate=True)
    live = normalize(live)
    return captured._replace(eqns=live.eqns, outvars=live.outvars), shapes


def trace_context() -> Hashable:
    """Give what a trace depends on beside its arguments: meshes, precision, x64, named axes."""
    return _config.trace_context()


def call_types(args: Any) -> tuple[Hashable, Hashable, Hashable]:
    """Describe a call by the structure and types of its arguments, and JAX's context.

    Args:
        args: Any pytree of arrays, numbers and `ShapeDtypeStruct`s, traced ones too.

    Returns:
        What is equal for calls that are traced alike.

    Raises:
        TypeError: If something in it is no array.
    """
    flat, structure = jax.tree.flatten(args)
    return structure, tuple(map(shaped_abstractify, flat)), trace_context()


def is_jaxpr(value: Any) -> bool:
    """Tell whether a value is an open or closed jaxpr."""
    return hasattr(value, "eqns") and hasattr(value, "outvars")


def subjaxprs(eqn: Any) -> list[Any]:
    """List the jaxprs among the parameters of an equation, whatever their names."""
    several = (v if isinstance(v, tuple | list) else (v,) for v in eqn.params.values())
    return [one for values in several for one in values if is_jaxpr(one)]


def map_equations(jaxpr: Any, change: Callable[[Any], Any]) -> Any:
    """Make an open or closed jaxpr with each of its own equations replaced by `change(eqn)`."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # in JAX 0.12 a jaxpr is its own
    if inner is not jaxpr:
        return jaxpr.replace(jaxpr=map_equations(inner, change))
    return jaxpr.replace(eqns=[change(eqn) for eqn in jaxpr.eqns])


def map_subjaxprs(eqn: Any, change: Callable[[Any], Any]) -> Any:
    """Make an equation with each jaxpr among its parameters replaced by `change(jaxpr)`."""

    def enter(value: Any) -> Any:
        if isinstance(value, tuple | list) and any(map(is_jaxpr, value)):
            return type(value)(map(enter, value))
        return change(value) if is_jaxpr(value) else value

    params = {key: enter(value) for key, value in eqn.params.items()}
    changed = any(params[key] is not value for key, value in eqn.params.items())
    return eqn.replace(params=params) if changed else eqn


def function_name(eqn: Any) -> str | None:
    """Name the function that a construct was made of, `relu` say, if it had a name."""
    call = eqn.params.get("call_jaxpr")
    info = getattr(call, "debug_info", None) or getattr(
        getattr(call, "jaxpr", None), "debug_info", None
    )
    return eqn.params.get("name") or getattr(info, "func_name", None)


@contextmanager
def context(eqn: Any) -> Iterator[None]:
    """Enter the mesh, precision and compute contexts, and the name scope, of an equation."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def bind(eqn: Any, operands: Sequence[Any], params: Any = None) -> list[Any]:
    """Bind an equation's primitive, whole, on other operands."""
    params = dict(eqn.primitive.get_bind_params(eqn.params if params is None else params))
    with context(eqn):
        results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Count the constants and the carries among the operands of a scan."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def bind_custom_jvp(
    eqn: Any,
    operands: Sequence[Any],
    primal: Callable[..., Any],
    derivative: Callable[..., Any] | None = None,
) -> list[Any]:
    """Bind a `custom_jvp` whose values come from `primal`, and tangents from its own rule.

    Args:
        eqn: The equation.
        operands: Its operands.
        primal: `(*operands) -> results`.
        derivative: `(program, *operands and tangents) -> results`, given the rule's own program
            over operands and tangents that are not zero; `None` runs the rule as it is.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    (_, rule), count = params["subfuns"], len(operands)

    def jvp(*primals_and_tangents: Any) -> list[Any]:
        if derivative is None:
            results = rule.call_wrapped(*primals_and_tangents)
        else:
            results = _run_derivative(eqn, primals_and_tangents, derivative)
        tangents = results[len(results) // 2 :]
        return [*primal(*primals_and_tangents[:count]), *tangents]

    wrap = _wrap(eqn)
    with context(eqn):
        return list(
            eqn.primitive.bind(*operands, **{**params, "subfuns": (wrap(primal), wrap(jvp))})
        )


def _run_derivative(eqn: Any, values: Sequence[Any], derivative: Callable[..., Any]) -> list[Any]:
    """Run the program of a `custom_jvp` rule, as JAX does, but by `derivative`."""
    half, skipped = len(values) // 2, eqn.params["num_consts"]
    primals, tangents = values[skipped:half], values[half + skipped :]
    zeros = [isinstance(t, SymbolicZero) for t in tangents]
    jaxpr, consts, out_zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*zeros)
    given = [t for t, zero in zip(tangents, zeros, strict=True) if not zero]
    results = derivative(_with_consts(jaxpr, consts), zeros, *primals, *given)
    outs, rest = results[: len(out_zeros)], iter(results[len(out_zeros) :])
    moved = [
        SymbolicZero(jax.typeof(out).to_tangent_aval()) if zero else next(rest)
        for out, zero in zip(outs, out_zeros, strict=True)
    ]
    return [*outs, *moved]


def _with_consts(jaxpr: Any, consts: Sequence[Any]) -> Program:
    """Close a jaxpr over its constants, which are leading arguments in JAX 0.12."""
    closed = normalize(jaxpr)._replace(consts=tuple(consts))
    if len(closed.constvars) != len(consts):
        cut = len(consts)
        closed = closed._replace(constvars=closed.invars[:cut], invars=closed.invars[cut:])
    return closed


def bind_custom_vjp(
    eqn: Any,
    operands: Sequence[Any],
    primal: Callable[..., Any],
    forward: Callable[..., Any],
) -> list[Any]:
    """Bind a `custom_vjp` with another primal and forward function, and its own backward rule.

    Args:
        eqn: The equation.
        operands: Its operands.
        primal: `(*operands) -> results`.
        forward: `(program, *operands) -> results of program`, given the rule's own forward
            program when (and if) the function is differentiated.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    thunk, skipped = eqn.params["fwd_jaxpr_thunk"], eqn.params["num_consts"]
    backward = _fit_backward(params["subfuns"][2], [jax.typeof(x) for x in operands[skipped:]])

    def fwd(*values_and_flags: Any) -> list[Any]:
        values, flags = values_and_flags[::2], values_and_flags[1::2]
        jaxpr, consts = thunk.call_wrapped(*flags[skipped:])
        return forward(_with_consts(jaxpr, consts), *values[skipped:])

    wrap = _wrap(eqn)
    subfuns = (wrap(primal), wrap(fwd), backward)
    with context(eqn):
        return list(eqn.primitive.bind(*operands, **{**params, "subfuns": subfuns}))


def _fit_backward(backward: Any, avals: Sequence[Any]) -> Any:
    """Have a backward rule expect cotangents of the operands that there are, not of fn's own."""
    fitted = lu.wrap_init(backward.f, debug_info=backward.debug_info)
    for transform, given in reversed(backward.transforms):
        args = list(given)
        for k, arg in enumerate(args):
            if isinstance(arg, tuple | list) and [type(a) for a in arg] == [type(a) for a in avals]:
                args[k] = tuple(avals)
        fitted = fitted.wrap(transform, tuple(args), None)
    return fitted


def _wrap(eqn: Any) -> Callable[[Callable[..., Any]], Any]:
    call = eqn.params["call_jaxpr"]
    info = getattr(call, "debug_info", None) or call.jaxpr.debug_info
    return lambda function: lu.wrap_init(function, debug_info=info)


def bind_remat(eqn: Any, operands: Sequence[Any], body: Callable[..., Any]) -> Any:
    """Bind a `checkpoint` around another body, with the same policy and barriers."""
    jaxpr, consts, tree = _open(body, operands)
    with context(eqn):
        results = eqn.primitive.bind(*consts, *operands, **{**eqn.params, "jaxpr": jaxpr})
    return jax.tree.unflatten(tree, results)


def _open(body: Callable[..., Any], operands: Sequence[Any]) -> tuple[Any, list[Any], Any]:
    """Trace body to an open jaxpr whose constants are its leading arguments."""
    closed: Any
    closed, shapes = jax.make_jaxpr(body, return_shape=True)(*operands)
    inner = partial_eval.convert_constvars_jaxpr(getattr(closed, "jaxpr", closed))
    return inner, list(closed.consts), jax.tree.structure(shapes)


def jit_like(eqn: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    """Jit `body(cells, *operands) -> (results, cells)` as the equation jits its own."""
    params = eqn.params
    body.__name__ = body.__qualname__ = params["name"]
    options: dict[str, Any] = {
        "keep_unused": params["keep_unused"],
        "inline": params["inline"],
        "compiler_options": dict(params["compiler_options_kvs"]) or None,
        "donate_argnums": tuple(k + 1 for k, d in enumerate(params["donated_invars"]) if d),
    }
    unset = [UNSPECIFIED] * len(params["in_shardings"])
    if list(params["in_shardings"]) != unset or any(params["in_layouts"]):
        placed = zip(params["in_shardings"], params["in_layouts"], strict=True)
        options["in_shardings"] = (UNSPECIFIED, *(_add_layout(*p) for p in placed))
    unset = [UNSPECIFIED] * len(params["out_shardings"])
    if list(params["out_shardings"]) != unset or any(params["out_layouts"]):
        placed = zip(params["out_shardings"], params["out_layouts"], strict=True)
        options["out_shardings"] = ([_add_layout(*p) for p in placed], UNSPECIFIED)
    return jax.jit(body, **options)


def is_placed(eqn: Any) -> bool:
    """Tell whether a `jit` says where its operands or results live, array by array."""
    names = ("in_shardings", "out_shardings")
    placed = [s for name in names for s in eqn.params.get(name, ()) if s is not UNSPECIFIED]
    layouts = [eqn.params.get(name, ()) for name in ("in_layouts", "out_layouts")]
    return bool(placed) or any(any(each) for each in layouts)


def _add_layout(sharding: Any, layout: Any) -> Any:
    return sharding if layout is None else Format(layout, sharding)
