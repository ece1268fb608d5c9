"""`trace`: fn as a graph, with every leaf accounted for."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.sites._graph import Graph, Use
from jaxcompress.graph.sites._views import parts_of
from jaxcompress.graph.sites._walk import Found, Place, Record, Value, Walker


class Traced(NamedTuple):
    """A captured call with what was found in it; what `replay` runs.

    Attributes:
        program: The program over the flat arguments.
        record: What the walk found; sites have their final names.
        values: The values of the program's results.
        leaves: `{path: leaf}` of params.
        inputs: The paths of the arrays of fn's other arguments: the argument's number or name, then
            where it is in that.
        outputs: The tree of results as shapes.
        walker: The walker, to go on with rules that are only known under differentiation.
    """

    program: Program
    record: Record
    values: list[Value]
    leaves: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: Any
    walker: Walker


def capture(
    fn: Callable[..., Any], params: Any, inputs: Any, kwargs: Any, *, prune: bool = False
) -> Traced:
    leaves = _checked_leaves(params)
    _check_inputs(inputs, kwargs)
    _check_call(fn, params, inputs, kwargs)
    try:
        program, outputs = _compat.capture(
            lambda params, inputs, kwargs: fn(params, *inputs, **kwargs),
            (params, inputs, kwargs),
            prune=prune,
        )
    except jax.errors.JAXTypeError as error:
        raise ArgumentTypeError(
            "fn",
            got=f"one that looks at values: {str(error).splitlines()[0].rstrip('.')}",
            expected="a function that `jax.make_jaxpr` can trace",
            fix="Use jnp.where, lax.cond or lax.while_loop, or bind the argument with "
            "functools.partial.",
        ) from error
    walker = Walker(leaves)
    args = [
        Value((view,), False, walker.fresh())
        for path, leaf in leaves.items()
        for view in parts_of(path, leaf)
    ]
    args += [Value((), True, walker.fresh()) for _ in program.invars[len(args) :]]
    record, values = walker.walk(program, args, Place())
    record.sites = _named(record, walker)
    named = jax.tree_util.tree_flatten_with_path((inputs, kwargs))[0]
    paths = tuple(tree.path_str(keypath[1:]) for keypath, _ in named)
    return Traced(program, record, values, leaves, paths, outputs, walker)


def _check_inputs(inputs: Any, kwargs: Any) -> None:
    for keypath, x in jax.tree_util.tree_flatten_with_path((inputs, kwargs))[0]:
        if not (hasattr(x, "dtype") or isinstance(x, bool | int | float | complex)):
            name = jax.tree_util.keystr(keypath[1:], simple=True, separator="/")
            raise ArgumentTypeError(
                "inputs",
                got=f"{type(x).__name__} {x!r} at {name}",
                expected="arrays, numbers or ShapeDtypeStructs, in any pytrees",
                fix="Bind what is no array: lambda params, x: fn(params, x, option).",
            )


def _check_call(fn: Callable[..., Any], params: Any, inputs: Any, kwargs: Any) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin, which says for itself what it takes
        return
    try:
        signature.bind(params, *inputs, **kwargs)
    except TypeError as error:
        raise ArgumentTypeError(
            "inputs",
            got=f"{len(inputs)} after params: {error}",
            expected=f"the arguments of fn{signature}",
            fix="Pass everything that fn takes after params, in its order.",
        ) from error


def _checked_leaves(params: Any) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, leaf in tree.items(params):
        for part in jax.tree.leaves(leaf):
            if not (hasattr(part, "shape") and hasattr(part, "dtype")):
                raise ArgumentTypeError(
                    "params",
                    got=f"{path!r} is {type(part).__name__} {part!r}",
                    expected="a pytree of arrays (or ShapeDtypeStructs)",
                    fix="Use jnp.asarray, or close over what is no parameter.",
                )
        if path in leaves:
            raise ArgumentError(
                "params",
                got=f"two leaves with the path {path!r}",
                expected="distinct paths",
                fix="Rename a key.",
            )
        leaves[path] = leaf
    return leaves


def _named(record: Record, walker: Walker) -> list[Found]:
    """Give sites unique names: the leaf's path, then `path#1`, `path#2`, ..."""
    count: dict[str, int] = {}
    names: dict[int, str] = {}
    for _, site, number in record.sites:
        k = count.get(site.path, 0)
        count[site.path] = k + 1
        names[number] = f"{site.path}#{k}" if k else site.path
    at: dict[Any, list[str]] = {}
    for position, _, number in record.sites:
        at.setdefault(position, []).append(names[number])
    return [
        found._replace(
            site=replace(
                found.site,
                name=names[found.number],
                upstream=tuple(names[n] for n in walker.upstream(found.number) if n in names),
                beside=tuple(n for n in at[found.position] if n != names[found.number]),
            )
        )
        for found in record.sites
    ]


def no_sites(record: Record) -> str:
    """Say why there is nothing to select, for a message."""
    inside = list(dict.fromkeys(scope[-1] for scope in record.opaque))
    if inside:
        return f"fn has no sites; what {', '.join(inside)} contracts inside cannot be seen."
    return "fn has no sites: it contracts none of its params."


def trace(fn: Callable[..., Any], params: tree.Params, *inputs: Any, **kwargs: Any) -> Graph:
    """Find where fn contracts its leaves, and account for every other use of them.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s, so that a model of any size can
    be traced; a symbolic dimension of `jax.export` is counted as 1. Leaves are followed through
    casts, transpositions, reshapes, slices, stacks and elementwise functions of params (masks,
    dequantization, weight norm), and through `jit`, `checkpoint`, `custom_jvp`, `custom_vjp`,
    `scan`, `while`, `cond`, `shard_map` and code that `vmap` has batched.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; a `LeafNode` such as a `QArray` counts as one leaf.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments, traced too.

    Returns:
        The graph.

    Raises:
        ArgumentTypeError: If params holds something that is no array, or fn cannot be traced.
        ArgumentError: If two leaves have one path.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5), "spare": jnp.ones(2)}
        >>> graph = trace(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((7, 3)))
        >>> (site,) = graph.sites
        >>> site.path, site.axes.contract, site.axes.output, site.flops
        ('kernel', (0,), (1,), 210)
        >>> dict(graph.uses), graph.unreached
        ({'bias': (Use(primitive='add', scope=(), repeats=1),)}, ('spare',))
    """
    traced = capture(fn, params, inputs, kwargs)
    record = traced.record
    uses: dict[str, list[Use]] = {}
    for path, use in record.uses:
        uses.setdefault(path, []).append(use)
    returned = []
    for value in traced.values:
        for view in value.views:
            if not view.through:
                returned.append(view.path)
            elif Use(primitive="output") not in uses.setdefault(view.path, []):
                uses[view.path].append(Use(primitive="output"))
    seen = {found.site.path for found in record.sites} | set(uses) | set(returned)
    return Graph(
        leaves=traced.leaves,
        sites=tuple(found.site for found in record.sites),
        uses={path: tuple(uses[path]) for path in traced.leaves if path in uses},
        returned=tuple(dict.fromkeys(returned)),
        unreached=tuple(path for path in traced.leaves if path not in seen),
        elsewhere=tuple(record.elsewhere),
        opaque=tuple(record.opaque),
        flops=record.flops,
        outputs=traced.outputs,
    )


def contraction_axes(
    fn: Callable[..., Any], params: tree.Params, *inputs: Any, **kwargs: Any
) -> dict[str, tuple[int, ...]]:
    """Find which axes of each leaf are summed over, whatever the library's layout.

    It is what `sparsity.make_mask(..., axes=...)` takes: N:M groups and channels then follow the
    contraction in Equinox's `(out, in)` kernels, stacked `(layers, in, out)` ones, and fused
    attention kernels, as they do in Flax's.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; shapes are enough.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        `{path: axes of the leaf}`, the window of a convolution included, for the leaves that fn
        contracts. Where sites of one leaf differ, the one of most FLOPs counts.

    Raises:
        ArgumentTypeError: As `trace`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"weight": jnp.ones((5, 3))}
        >>> contraction_axes(lambda p, x: p["weight"] @ x, params, jnp.ones(3))
        {'weight': (1,)}
    """
    graph = trace(fn, params, *inputs, **kwargs)
    axes: dict[str, tuple[int, ...]] = {}
    for site in sorted(graph.sites, key=lambda site: site.flops):
        contracted = tuple(sorted((*site.axes.contract, *site.axes.spatial)))
        if contracted:
            axes[site.path] = contracted
    return {path: axes[path] for path in graph.leaves if path in axes}
