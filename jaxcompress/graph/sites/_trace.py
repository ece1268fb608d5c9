"""`capture` and `trace`: a call of fn as a program, and as a graph: every leaf accounted for."""

import collections
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from jaxcompress import tree
from jaxcompress.errors import ArgumentError, ArgumentTypeError
from jaxcompress.graph.program import _compat
from jaxcompress.graph.program._compat import Program
from jaxcompress.graph.program._interpret import Walk
from jaxcompress.graph.sites._graph import Graph, Use
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._views import parts_of
from jaxcompress.graph.sites._walk import FoundSite, Record, Sites, Value, costliest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A call of fn, traced once: what `trace`, `dims`, `affine`, `cost` and others take for fn.

    Attributes:
        fn: The function.
        program: Its program over the flat arguments.
        leaves: `{path: leaf}` of params.
        inputs: The paths of the arrays of fn's other arguments: the argument's number or name, then
            where it is in that.
        outputs: The tree of results as shapes.
        args: The tree of `(params, inputs, kwargs)` as shapes, with shardings over a mesh.
        types: Equal for calls that are traced alike; see `takes`.
        record: What was found in it; sites have their final names.
        walk: The values of its variables.
        derived: What was derived from it, by name; see `derive`.
    """

    fn: Callable[..., Any]
    program: Program = field(repr=False)
    leaves: dict[str, Any] = field(repr=False)
    inputs: tuple[str, ...]
    outputs: Any
    args: Any = field(repr=False)
    types: Any = field(repr=False)
    record: Record = field(repr=False)
    walk: Walk[Value] = field(repr=False)
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order in which fn runs them."""
        return tuple(found.site for found in self.record.sites)

    @property
    def part_paths(self) -> list[str]:
        """The path of the leaf of each of the first arguments: a `LeafNode` has several parts."""
        return [path for path, leaf in self.leaves.items() for _ in jax.tree.leaves(leaf)]

    @property
    def domain(self) -> Sites:
        """What walks on through programs that are only known under differentiation."""
        assert isinstance(self.walk.domain, Sites)
        return self.walk.domain

    @property
    def lasts(self) -> bool:
        """Whether it may be kept: nothing in it belongs to a trace around, and ends."""
        consts = [x for body in self.walk.bodies.values() for x in body.program.consts]
        return not any(isinstance(x, Tracer) for x in (*consts, *jax.tree.leaves(self.leaves)))

    def derive(self, name: str, make: Callable[[], T]) -> T:
        """Give what was derived from this call before, such as its labels, or derive it.

        Args:
            name: What it is.
            make: Derives it.

        Returns:
            It.
        """
        if name not in self.derived:
            self.derived[name] = make()
        return self.derived[name]

    def takes(self, params: tree.Params, inputs: Any, kwargs: Any) -> bool:
        """Tell whether the program can be run on arguments.

        Args:
            params: Params.
            inputs: A tuple of fn's other arguments.
            kwargs: Its keyword arguments.

        Returns:
            Whether they have the structure, shapes and dtypes that it was captured for, and JAX
            is set as it was then: precision, 64 bits, mesh.
        """
        return _compat.call_types((params, inputs, kwargs)) == self.types


def capture(
    fn: Callable[..., Any] | Traced, params: tree.Params = None, *inputs: Any, **kwargs: Any
) -> Traced:
    """Trace a call of fn, once for all that is asked about it.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s. `trace`, `dims`, `affine`, `cost`,
    `remask` and `leaks` take the result in the place of fn, and then no arguments.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; a `Traced` is given back.
        params: Any pytree of arrays; a `LeafNode` such as a `QArray` counts as one leaf.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments, traced too.

    Returns:
        The call.

    Raises:
        ArgumentTypeError: If params holds something that is no array, or fn cannot be traced.
        ArgumentError: If two leaves have one path, or a `Traced` comes with arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((3, 5))}
        >>> traced = capture(lambda p, x: x @ p["kernel"], params, jnp.ones(3))
        >>> traced.sites[0].path, trace(traced).flops, traced.outputs.shape
        ('kernel', 30, (5,))
    """
    if not isinstance(fn, Traced):
        return capture_call(fn, params, inputs, kwargs)
    if params is not None or inputs or kwargs:
        raise ArgumentError(
            "fn",
            got="a Traced, and arguments",
            expected="a Traced alone, or a function and its arguments",
            fix="Leave the arguments out: the Traced has them.",
        )
    return fn


def wraps(fn: Callable[..., Any] | Traced) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a function look like fn, as `functools.wraps` does."""
    return functools.wraps(fn.fn if isinstance(fn, Traced) else fn)


def call_of(fn: Callable[..., Any] | Traced, params: Any, inputs: Any, kwargs: Any) -> Traced:
    """Trace a call of fn; a `Traced` is given back, or traced again for other shapes."""
    if isinstance(fn, Traced):
        if fn.takes(params, inputs, kwargs):
            return fn
        fn = fn.fn
    return capture_call(fn, params, inputs, kwargs)


def capture_call(
    fn: Callable[..., Any], params: Any, inputs: Any, kwargs: Any, *, prune: bool = False
) -> Traced:
    """Trace a call of fn; `prune` leaves out what no result depends on."""
    leaves = _check_leaves(params)
    _check_inputs(inputs, kwargs)
    _check_call(fn, params, inputs, kwargs)
    try:
        program, outputs = _compat.capture_program(
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
    domain = Sites({path: jax.tree.map(describe_array, leaf) for path, leaf in leaves.items()})
    args = [
        Value((view,), False, domain.fresh())
        for path, leaf in leaves.items()
        for view in parts_of(path, leaf)
    ]
    args += [Value((), True, domain.fresh()) for _ in program.invars[len(args) :]]
    record, walk = domain.walk(program, args)
    record.sites = _name_sites(record, domain)
    named = jax.tree_util.tree_flatten_with_path((inputs, kwargs))[0]
    return Traced(
        fn=fn,
        program=program,
        leaves=leaves,
        inputs=tuple(tree.path_str(keypath[1:]) for keypath, _ in named),
        outputs=outputs,
        args=jax.tree.map(describe_array, (params, inputs, kwargs)),
        types=_compat.call_types((params, inputs, kwargs)),
        record=record,
        walk=walk,
    )


def describe_array(x: Any, shape: Sequence[int] | None = None) -> Any:
    """Describe an array as tracing sees it; what is no array stays.

    Args:
        x: An array, traced or not, or a `ShapeDtypeStruct`.
        shape: Another shape than its own.

    Returns:
        A `ShapeDtypeStruct` with its dtype, weak type, and how it is sharded over a mesh (over
        Explicit axes only, for another shape).
    """
    if not hasattr(x, "dtype"):
        return x
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    where = getattr(aval, "sharding", None)
    if AxisType.Explicit not in getattr(getattr(where, "mesh", None), "axis_types", ()):
        where = None if shape is not None or isinstance(x, Tracer) else getattr(x, "sharding", None)
        where = where if isinstance(where, NamedSharding) else None
    weak = getattr(aval, "weak_type", False)
    shape = x.shape if shape is None else tuple(shape)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where, weak_type=weak)


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


def _check_leaves(params: Any) -> dict[str, Any]:
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


def _name_sites(record: Record, domain: Sites) -> list[FoundSite]:
    """Give sites unique names: the leaf's path, then `path#1`, `path#2`, ..."""
    unique = number_repeats([found.site.path for found in record.sites])
    numbers = [found.number for found in record.sites]
    names = dict(zip(numbers, unique, strict=True))
    at: dict[Any, list[str]] = {}
    for position, _, number in record.sites:
        at.setdefault(position, []).append(names[number])
    return [
        found._replace(
            site=replace(
                found.site,
                name=names[found.number],
                upstream=tuple(names[n] for n in domain.upstream(found.number) if n in names),
                beside=tuple(n for n in at[found.position] if n != names[found.number]),
            )
        )
        for found in record.sites
    ]


def number_repeats(names: Sequence[str]) -> list[str]:
    """Make names distinct, by the number of those before that are the same.

    Args:
        names: Any names.

    Returns:
        Them; the second of a name ends with `#1`, or the first number that is free.

    Example:
        >>> number_repeats(["up", "down", "up"])
        ['up', 'down', 'up#1']
        >>> number_repeats(["up", "up#1", "up"])
        ['up', 'up#1', 'up#2']
    """
    before: collections.Counter[str] = collections.Counter()
    distinct: dict[str, None] = {}
    for name in names:
        free = name
        while free in distinct:
            before[name] += 1
            free = f"{name}#{before[name]}"
        distinct[free] = None
    return list(distinct)


def suggest_sites(traced: Traced) -> str:
    """Say which leaves have sites, or why there are none, for a message."""
    if traced.sites:
        known = list(dict.fromkeys(site.path for site in traced.sites))
        return f"The leaves with sites are: {tree.shorten(known)}."
    inside = list(dict.fromkeys(scope[-1] for _, scope in traced.record.opaque))
    if inside:
        return f"fn has no sites; what {', '.join(inside)} contracts inside cannot be seen."
    return "fn has no sites: it contracts none of its params."


def trace(
    fn: Callable[..., Any] | Traced, params: tree.Params = None, *inputs: Any, **kwargs: Any
) -> Graph:
    """Find where fn contracts its leaves, and account for every other use of them.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s, so that a model of any size can
    be traced; a symbolic dimension of `jax.export` is counted as 1. Leaves are followed through
    casts, transpositions, reshapes, slices, stacks and elementwise functions of params (masks,
    dequantization, weight norm), and through `jit`, `checkpoint`, `custom_jvp`, `custom_vjp`,
    `scan`, `while`, `cond`, `shard_map` and code that `vmap` has batched.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced`, without arguments.
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
    traced = capture(fn, params, *inputs, **kwargs)
    record = traced.record
    uses: dict[str, dict[Use, None]] = {}
    for _, path, use in record.uses:
        uses.setdefault(path, {})[use] = None
    returned = []
    for value in traced.walk.results:
        for view in value.views:
            if not view.through:
                returned.append(view.path)
            else:
                uses.setdefault(view.path, {})[Use(primitive="output")] = None
    seen = {found.site.path for found in record.sites} | set(uses) | set(returned)
    return Graph(
        leaves=traced.leaves,
        sites=traced.sites,
        uses={path: tuple(uses[path]) for path in traced.leaves if path in uses},
        returned=tuple(dict.fromkeys(returned)),
        unreached=tuple(path for path in traced.leaves if path not in seen),
        elsewhere=tuple(contraction for _, contraction in record.elsewhere),
        opaque=tuple(scope for _, scope in record.opaque),
        flops=int(costliest((branch, flops) for _, branch, flops in record.flops)),
        outputs=traced.outputs,
    )


def contraction_axes(
    fn: Callable[..., Any] | Traced, params: tree.Params = None, *inputs: Any, **kwargs: Any
) -> dict[str, tuple[int, ...]]:
    """Find which axes of each leaf are summed over, whatever the library's layout.

    It is what `sparsity.make_mask(..., axes=...)` takes: N:M groups and channels then follow the
    contraction in Equinox's `(out, in)` kernels, stacked `(layers, in, out)` ones, and fused
    attention kernels, as they do in Flax's.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure; or a `Traced`, without arguments.
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
