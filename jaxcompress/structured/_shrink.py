"""`shrink`: a function and its params made smaller, with a certificate of equivalence."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from jaxcompress import graph, tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import Traced
from jaxcompress.graph.dims import fill_removed, mask_of
from jaxcompress.graph.sites import call as run_call
from jaxcompress.graph.sites import call_of
from jaxcompress.structured._certificate import (
    Certificate,
    Distances,
    Leak,
    distance,
    is_abstract,
    random_like,
    size_of,
    tolerance_of,
    widen_outputs,
)
from jaxcompress.structured._find import groups as find_groups
from jaxcompress.structured._keep import Keep
from jaxcompress.structured._keep import keep as make_keep


def slice_params(params: tree.Params, keep: Keep) -> tree.Params:
    """Take the kept indices of every leaf.

    Args:
        params: Params at full size, or any tree whose leaves are found under their paths in it:
            gradients, an average of params, masks. Shapes (`ShapeDtypeStruct`) stay shapes.
        keep: What is kept.

    Returns:
        The same tree with smaller leaves.

    Raises:
        ArgumentError: If a leaf has another shape than the one that was chosen for.
    """
    return tree.map_with_path(lambda path, leaf: slice_leaf(path, leaf, keep), params)


def slice_leaf(path: str, leaf: Any, keep: Keep) -> Any:
    """Take the kept indices of an array like the leaf at a path."""
    want = keep.shapes.get(path)
    if want != tuple(leaf.shape):
        raise ArgumentError(
            "params",
            got=f"{path!r} of shape {tuple(leaf.shape)}",
            expected="a leaf that the indices were chosen for" if want is None else f"{want}",
            fix="Give the params at full size that `keep` was chosen for.",
        )
    axes = keep.leaves.get(path, {})
    if not axes:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(keep.shape(path), leaf.dtype)
    for axis, indices in axes.items():
        if indices.ndim == 1:
            leaf = graph.take(leaf, indices, axis)
        else:
            leaf = graph.take_by_layer(leaf, indices, axis, keep.layers[path])
    return leaf


def mask_params(params: tree.Params, keep: Keep) -> tree.Params:
    """Set what is not kept to zero, at full size: what a mask in training would do.

    Args:
        params: Params at full size.
        keep: What is kept.

    Returns:
        Params of the same shapes.
    """

    def mask_leaf(path: str, leaf: Any) -> Any:
        for axis, indices in keep.leaves.get(path, {}).items():
            layer = keep.layers[path] if indices.ndim > 1 else None
            leaf = fill_removed(leaf, mask_of(indices, leaf.shape[axis]), axis, layer, 0)
        return leaf

    return tree.map_with_path(mask_leaf, params)


def rebuild(fn: Callable[..., Any], keep: Keep) -> Callable[..., Any]:
    """Make the smaller function again from fn and what was kept; no weights are needed.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, the function at full size.
        keep: What was kept, from `shrink`'s `keep` or `Keep.load`.

    Returns:
        The function of smaller params. It is fn replayed: it takes other batch sizes and works
        under jit, grad, vmap and `jax.export`. fn is traced once for arguments of the same shapes
        and types, as under jit. The backward rule of a `custom_vjp` runs at the smaller size: what
        it makes itself along an axis that shrank (random bits, iotas) is not what fn's makes, and
        gradients are then wrong, which no certificate sees.

    Raises:
        ArgumentError: When called, if `keep` is of another model, or params have other shapes.
        StructureError: When called, if params has other leaves.

    Example:
        >>> from jaxcompress import structured
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> groups = structured.groups(fn, params, jnp.ones((1, 3)))
        >>> small = rebuild(fn, structured.keep(groups, {"up": [0, 2, 5]}))
        >>> small({"up": jnp.ones((3, 3)), "down": jnp.ones((3, 2))}, jnp.ones((7, 3))).shape
        (7, 2)
    """
    return graph.resize(fn, keep.leaves, keep.shapes)


def shrink(
    fn: Callable[..., Any],
    params: tree.Params,
    keep: Keep | Mapping[str, ArrayLike],
    *inputs: Any,
    compiled: bool = False,
    **kwargs: Any,
) -> tuple[Callable[..., Any], tree.Params, Certificate]:
    """Remove everything but `keep` from params and from fn, and show that nothing else changed.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; for shapes only, nothing is run and the certificate says so.
        keep: From `choose` or `structured.keep`, or `{group: units to keep}`.
        *inputs: fn's other arguments: the certificate compares on these, and on random ones.
        compiled: Have the CPU's compiler count FLOPs too, for the certificate.
        **kwargs: fn's keyword arguments.

    Returns:
        `(fn', params', certificate)`; see `rebuild` for fn'.

    Raises:
        SelectionError: If a group is not known, or frozen.
        ArgumentError: If indices or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
        >>> small, fewer, certificate = shrink(fn, params, {"up": [0, 2, 5]}, jnp.ones((1, 3)))
        >>> fewer["up"].shape, certificate.holds, certificate.after.params
        ((3, 3), True, 15)
    """
    if not isinstance(keep, Keep):
        keep = make_keep(find_groups(fn, params, *inputs, whole_heads=False, **kwargs), keep)
    with jax.default_matmul_precision("highest"):  # accelerators use fewer bits otherwise
        traced = call_of(_known_call(keep, fn), params, inputs, kwargs)
        smaller, small = slice_params(params, keep), rebuild(fn, keep)
        shrunk = _Shrunk(traced, keep, params, small, smaller, kwargs)
        certificate = _certify_shrink(shrunk, inputs, compiled=compiled)
    return small, smaller, certificate


def _known_call(keep: Keep, fn: Callable[..., Any]) -> Callable[..., Any] | Traced:
    """Give the call that indices were chosen for, if it is one of fn; fn otherwise."""
    known = keep.traced
    if known is None:
        return fn
    # A method is made anew each time that it is asked for.
    alike = isinstance(fn, types.MethodType) and known.fn == fn
    return known if known.fn is fn or alike else fn


class _Shrunk(NamedTuple):
    """A captured call, what is kept of it, and the function and params that are left."""

    traced: Traced
    keep: Keep
    params: tree.Params
    small: Callable[..., Any]
    smaller: tree.Params
    kwargs: Mapping[str, Any]


def _certify_shrink(shrunk: _Shrunk, inputs: Sequence[Any], *, compiled: bool) -> Certificate:
    traced, keep, params, small, smaller, kwargs = shrunk
    given = distances_on = None
    leaks: tuple[Leak, ...] = ()
    tolerance = 0.0
    if not is_abstract(params):
        compare = _Comparison(shrunk, inputs)
        given = None if is_abstract(inputs) else compare.distances(inputs)
        drawn = random_like(inputs)
        distances_on = compare.distances(drawn)
        tolerance = compare.tolerance
        if distances_on.weights.relative > tolerance:
            leaks = graph.leaks(traced, keep.leaves, params, *drawn, **kwargs)
    return Certificate(
        given=given,
        random=distances_on,
        tolerance=tolerance,
        leaks=leaks,
        before=size_of(traced, params, compiled=compiled),
        after=size_of(graph.capture(small, smaller, *inputs, **kwargs), smaller, compiled=compiled),
    )


class _Comparison:
    """The smaller function beside its three references.

    The structural distance is taken in float32 where fn runs in it: in bfloat16 rounding would hide
    what it is to show.
    """

    def __init__(self, shrunk: _Shrunk, inputs: Sequence[Any]):
        self._shrunk = shrunk
        traced, keep, params, small, *_ = shrunk
        self._masked = mask_params(params, keep)
        wide = self._capture_wide(inputs)
        self._wide, exact = wide is not None, traced if wide is None else wide
        call = lambda params, *inputs, **kwargs: run_call(traced, params, inputs, kwargs)
        self._dense, self._small = jax.jit(call), jax.jit(small)
        self._exact = self._small
        if self._wide:
            self._exact = jax.jit(graph.resize(exact, keep.leaves, keep.shapes))
        self._remasked = jax.jit(graph.remask(exact, keep.leaves))
        dims = graph.dims(exact)
        self._state = dims.state
        variables = [var.aval for _, env in dims.programs.values() for var in env]
        self.tolerance = tolerance_of(params if not self._wide else (), (), variables)

    def _capture_wide(self, inputs: Sequence[Any]) -> Traced | None:
        """Trace fn in float32, if anything is narrower and fn takes it so."""
        narrow = (self._shrunk.params, inputs)
        wide = jax.eval_shape(widen_outputs, narrow)
        if wide == jax.eval_shape(lambda x: x, narrow):
            return None
        try:
            return call_of(self._shrunk.traced.fn, wide[0], tuple(wide[1]), self._shrunk.kwargs)
        except (TypeError, ValueError):  # it mixes them with a dtype of its own
            return None

    def distances(self, inputs: Sequence[Any]) -> Distances:
        _, _, params, _, smaller, kwargs = self._shrunk
        run = lambda fn, params, inputs: fn(params, *inputs, **kwargs)
        exactly = widen_outputs if self._wide else lambda values: values
        outputs = run(self._small, smaller, inputs)
        exact = run(self._exact, exactly(smaller), exactly(inputs)) if self._wide else outputs
        remasked = run(self._remasked, exactly(params), exactly(inputs))
        masked = run(self._dense, self._masked, inputs)
        dense = run(self._dense, params, inputs)
        return Distances(
            structural=distance(exact, self._cut(remasked)),
            weights=distance(outputs, self._cut(masked)),
            dense=distance(outputs, self._cut(dense)),
        )

    def _cut(self, outputs: Any) -> Any:
        """Take the kept indices of outputs that are new state."""
        flat, treedef = jax.tree.flatten(outputs)
        for number, path in self._state.items():
            flat[number] = slice_leaf(path, flat[number], self._shrunk.keep)
        return jax.tree.unflatten(treedef, flat)
