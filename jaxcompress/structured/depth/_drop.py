"""`drop_layers`: residual blocks and layers removed, with a certificate."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph import capture
from jaxcompress.graph.program import Calls, Position, run_program
from jaxcompress.graph.sites import call as run_call
from jaxcompress.graph.sites import describe_array
from jaxcompress.structured._certificate import (
    Certificate,
    Distances,
    distance,
    is_abstract,
    random_like,
    size_of,
    tolerance_of,
)
from jaxcompress.structured.depth._blocks import Analysis, abstract, analyse
from jaxcompress.structured.depth._dropped import (
    Chosen,
    Dropped,
    choose_dropped,
    describe_type,
    set_zero,
)
from jaxcompress.structured.depth._flow import Flow
from jaxcompress.structured.depth._gated import run_gated
from jaxcompress.structured.depth._surgery import Kept, Surgery, operate, plan_of, take_rows
from jaxcompress.structured.depth._without import GONE, drop_marked


def drop_layers(
    fn: Callable[..., Any], params: tree.Params, blocks: Chosen, *inputs: Any, **kwargs: Any
) -> tuple[Callable[..., Any], tree.Params, Certificate]:
    """Remove residual blocks, `x + f(x) -> x`, or whole layers of a stack.

    What only served a block goes with it: its leaves (those that are read elsewhere, too, stay),
    and results of fn that are new values of such leaves, as the statistics of a BatchNorm in
    training. Leaves of stacked layers, which a scan reads row by row, lose the rows of the layers
    that go, and the scan becomes shorter. A block of a stack can go from all layers at once; from
    some layers only it cannot, since its leaves would have fewer rows than the others. Quantized
    leaves of a stack keep their rows: drop first, then quantize.

    The new function is fn replayed: it takes other batch sizes and works under jit, grad, vmap
    and `jax.export`. What is left is fn's own, so positions and layer numbers that fn computes
    do not shift.

    Args:
        fn: `fn(params, *inputs, **kwargs) -> outputs`, pure.
        params: Any pytree of arrays; shapes are enough, the certificate then has sizes only.
        blocks: What goes: names or globs of blocks and layers, `Block`s or `Layer`s, one or
            several. Layer 3 of a stack is `"layers[3]"`; `{"layers": [3, 5]}` names several.
            See `structured.blocks`.
        *inputs: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        `(fn', params', certificate)`. `fn'.dropped` is the decision, to be saved. In the
        certificate, the structural distance is to fn with the branch multiplied by zero (for
        whole layers, with what the scan carries passing by), the others to fn on params with
        zeros for what went, and to fn.

    Raises:
        SelectionError: If a name is no block of fn; it lists the nearest.
        ArgumentError: If indices are out of range, nothing would stay, a block's shortcut is not
            its input, or what a block computes is needed elsewhere.
        ArgumentTypeError: As `graph.trace`, or if `blocks` is of another type.

    Example:
        >>> def fn(params, x):
        ...     for layer in ("layer_0", "layer_1"):
        ...         x = x + jnp.tanh(x @ params[layer]["up"]) @ params[layer]["down"]
        ...     return x @ params["head"]
        >>> layer = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 3))}
        >>> params = {"layer_0": layer, "layer_1": layer, "head": jnp.ones((3, 2))}
        >>> smaller, fewer, certificate = drop_layers(fn, params, "layer_1", jnp.ones((7, 3)))
        >>> tree.paths(fewer), certificate.holds
        (['head', 'layer_0/down', 'layer_0/up'], True)
        >>> smaller(fewer, jnp.ones((2, 3))).shape
        (2, 2)

    Reference:
        Men et al., ShortGPT: Layers in large language models are more redundant than you expect,
        arXiv:2403.03853.
    """
    # Accelerators multiply float32 in fewer bits unless they are told not to.
    with jax.default_matmul_precision("highest"):
        analysis = analyse(fn, params, inputs, kwargs)
        dropped, surgery = decide(analysis, blocks)
        fewer, smaller = dropped.apply(params), rebuild_layers(fn, dropped, params)
        whole = _Smaller(analysis, surgery)
        certificate = _certify_drop(smaller, params, fewer, (inputs, kwargs), whole)
    return smaller, fewer, certificate


def rebuild_layers(
    fn: Callable[..., Any], dropped: Dropped, params: tree.Params
) -> Callable[..., Any]:
    """Make the function without the dropped layers again; dense weights are not needed.

    Args:
        fn: The dense function.
        dropped: The decision: `fn'.dropped`, or one that was loaded.
        params: The shapes of the dense params, such as `jax.eval_shape` gives; they say which
            containers they are.

    Returns:
        fn', of the params that `drop_layers` gave.

    Raises:
        StructureError: If params are not those that blocks were dropped from; when called,
            if its params are not the smaller ones.
        ArgumentError: When called, if fn has no such blocks, or reads a leaf that went.

    Example:
        >>> def fn(params, x):
        ...     for w in params:
        ...         x = x + x @ w
        ...     return x
        >>> params = [jnp.ones((2, 2)), jnp.ones((2, 2))]
        >>> smaller, fewer, _ = drop_layers(fn, params, "0", jnp.ones((1, 2)))
        >>> again = rebuild_layers(fn, smaller.dropped, jax.eval_shape(lambda: params))
        >>> again(fewer, jnp.ones((1, 2))).tolist()
        [[3.0, 3.0]]
    """
    dropped.check(params)
    dense = abstract(params)
    structure = jax.tree.structure(dense, is_leaf=tree.is_leaf)
    shapes = dict(tree.items(dense))

    calls: Calls[_Smaller] = Calls()

    def plan(params: tree.Params, inputs: Any, kwargs: Any) -> _Smaller:
        given = dict(tree.items(params))
        seen = [given.get(path, like) for path, like in shapes.items()]
        seen = [  # shapes, so that what is kept of the call holds no params
            describe_array(x, like.shape)
            if path in dropped.rows
            else jax.tree.map(describe_array, x)
            for x, (path, like) in zip(seen, shapes.items(), strict=True)
        ]
        analysis = analyse(fn, jax.tree.unflatten(structure, seen), inputs, kwargs)
        return _Smaller(analysis, _decide_again(analysis, dropped))

    def call(params: tree.Params, *inputs: Any, **kwargs: Any) -> Any:
        dropped.check_smaller(params)
        args = params, inputs, kwargs
        smaller = calls.get(args, lambda: plan(*args), lambda smaller: smaller.traced.lasts)
        return smaller(*args)

    smaller: Any = functools.wraps(fn)(call)
    smaller.dropped = dropped
    return smaller


class _Smaller:
    """A captured call without what was dropped, to be run on smaller params."""

    def __init__(self, analysis: Analysis, surgery: Surgery):
        self.analysis, self.surgery, self.traced = analysis, surgery, analysis.traced
        self._plan = plan_of(analysis.flow, surgery)

    def __call__(self, params: tree.Params, inputs: Any, kwargs: Any) -> Any:
        given, flat = dict(tree.items(params)), list[Any]()
        for path, like in self.traced.leaves.items():
            absent = [None] * len(jax.tree.leaves(like))
            flat += jax.tree.leaves(given[path]) if path in given else absent
        flat += jax.tree.leaves((inputs, kwargs))
        return self.cut(run_program(self.traced.program, flat, self._plan, {})[0])

    def cut(self, results: Sequence[Any]) -> Any:
        """Make outputs of results, without those that mirror leaves of what is gone."""
        arrays = [
            GONE
            if k in self.surgery.dropped_outputs
            else x
            if isinstance(x, jax.Array)
            else jnp.asarray(x)
            for k, x in enumerate(results)
        ]
        return drop_marked(jax.tree.unflatten(jax.tree.structure(self.traced.outputs), arrays))

    def shorten(self, outputs: Any) -> Any:
        """Take out of fn's outputs at full size what is not returned any more."""
        results = jax.tree.leaves(outputs)
        for k, (axis, scan) in self.surgery.short_outputs.items():
            results[k] = take_rows(results[k], axis, self.surgery.kept[scan])
        return self.cut(results)


def decide(analysis: Analysis, blocks: Chosen) -> tuple[Dropped, Surgery]:
    """Work out what goes with chosen blocks and layers."""
    names, iterations = choose_dropped(analysis, blocks)
    kept = _list_kept(analysis, iterations)
    chosen = [analysis.blocks[name] for name in names]
    surgery = operate(analysis.traced, chosen, kept)
    _check_gone(analysis, names, surgery)
    dropped = Dropped(
        blocks=tuple(names),
        iterations=iterations,
        removed=surgery.removed,
        rows={path: (axis, kept[scan]) for path, (axis, scan) in surgery.rows.items()},
        leaves={path: describe_type(leaf) for path, leaf in analysis.traced.leaves.items()},
    )
    return dropped, surgery


def _list_kept(analysis: Analysis, iterations: Mapping[str, Sequence[int]]) -> Kept:
    chosen = [(analysis.stacks[name], gone) for name, gone in iterations.items()]
    return {
        stack.node.position: tuple(i for i in range(stack.length) if i not in gone)
        for stack, gone in chosen
    }


def _decide_again(analysis: Analysis, dropped: Dropped) -> Surgery:
    """Do in another call what was decided in one."""
    unknown = [name for name in dropped.blocks if name not in analysis.blocks]
    unknown += [name for name in dropped.iterations if name not in analysis.stacks]
    if unknown:
        raise ArgumentError(
            "inputs",
            got=f"a call of fn without the blocks {tree.shorten(unknown)}",
            expected="calls in which fn runs the blocks that were dropped",
            fix="Drop them with inputs and keywords like those of this call.",
        )
    chosen = [analysis.blocks[name] for name in dropped.blocks]
    kept = _list_kept(analysis, dropped.iterations)
    surgery = operate(analysis.traced, chosen, kept, shorter=dropped.rows)
    paths = analysis.traced.part_paths
    read = {
        p for v, p in zip(analysis.flow.inputs, paths, strict=False) if v in surgery.live.values[()]
    }
    missing = [p for p in dropped.removed if p in read]
    missing += [p for p in dropped.rows if p in read and p not in surgery.rows]
    if missing:
        raise ArgumentError(
            "inputs",
            got=f"a call in which fn reads {tree.shorten(missing)} outside what was dropped",
            expected="calls in which fn reads these leaves nowhere else",
            fix="Drop the blocks with inputs and keywords like those of this call.",
        )
    return surgery


def _check_gone(analysis: Analysis, names: Sequence[str], surgery: Surgery) -> None:
    """Refuse a block of which every contraction is needed for something else than its sum."""
    sites = analysis.traced.record.sites
    nodes = _nodes(analysis.flow)
    for name in names:
        mine = [sites[k] for k in analysis.blocks[name].sites]
        left = [s.site.name for s in mine if _innermost(s.position, nodes) in surgery.live.nodes]
        if len(left) == len(mine):
            raise ArgumentError(
                "blocks",
                got=f"{name!r}, whose {tree.shorten(left)} fn reads elsewhere, too",
                expected="a block whose inside is needed for its sum only",
                fix="Let fn return none of what the block computes inside.",
            )


def _nodes(flow: Flow) -> set[Position]:
    found = {node.position for node in flow.nodes}
    return found.union(*(_nodes(node.body) for node in flow.nodes if node.body is not None))


def _innermost(position: Position, nodes: set[Position]) -> Position:
    """Find the node at a position, or the closest one around it."""
    return next(position[:n] for n in range(len(position), 0, -2) if position[:n] in nodes)


# --- the certificate ------------------------------------------------------------------------------


def _certify_drop(
    smaller: Any, params: tree.Params, fewer: tree.Params, given: Any, whole: _Smaller
) -> Certificate:
    """Compare fn' with the captured call at full size; `given` are its inputs."""
    analysis, traced, dropped = whole.analysis, whole.traced, smaller.dropped
    switched = jax.jit(lambda *args: whole.shorten(_switch_off(analysis, dropped, args)))
    dense = jax.jit(lambda *args: whole.shorten(run_call(traced, *args)))
    shrunk = jax.jit(lambda params, inputs, kwargs: smaller(params, *inputs, **kwargs))

    def measure(call: Any) -> Distances:
        outputs = shrunk(fewer, *call)
        return Distances(
            structural=distance(outputs, switched(params, *call)),
            weights=distance(outputs, dense(set_zero(params, dropped), *call)),
            dense=distance(outputs, dense(params, *call)),
        )

    inputs, kwargs = given
    return Certificate(
        given=None if is_abstract(params, given) else measure(given),
        random=None if is_abstract(params) else measure(random_like(given)),
        tolerance=tolerance_of(params, given, traced.outputs),
        leaks=(),
        before=size_of(traced, params),
        after=size_of(capture(smaller, fewer, *inputs, **kwargs), fewer),
        notes=_notes(analysis, dropped),
    )


def _notes(analysis: Analysis, dropped: Dropped) -> tuple[str, ...]:
    """Say which leaves of what was dropped stay, since something else reads them."""
    leaves = [p for name in dropped.blocks for p in analysis.blocks[name].paths]
    leaves = [p for p in dict.fromkeys(leaves) if p not in dropped.removed]
    stacked = [p for name in dropped.iterations for p in analysis.stacks[name].paths]
    whole = [p for p in stacked if p not in dropped.rows and p not in dropped.removed]
    notes = [f"{p} stays: it is read outside what was dropped" for p in leaves]
    for path in whole:
        quantized = isinstance(analysis.traced.leaves[path], tree.LeafNode)
        why = "it is quantized" if quantized else "not only the scan reads them"
        notes.append(f"{path} keeps its rows: {why}")
    return tuple(notes)


def _switch_off(analysis: Analysis, dropped: Dropped, args: Any) -> Any:
    """Run fn at full size with the branches set to zero, and stacked layers passed by."""
    gates = {name: jnp.zeros(analysis.blocks[name].stack, jnp.bool_) for name in dropped.blocks}
    layers = {
        name: ~jnp.isin(jnp.arange(analysis.stacks[name].length), jnp.asarray(gone))
        for name, gone in dropped.iterations.items()
    }
    return run_gated(analysis, args, gates, layers=layers)
