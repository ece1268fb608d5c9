"""What a function costs: counted from its jaxpr, and by the compiler of any target."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph.cost._aot import Outcome, compile_for
from jaxcompress.graph.cost._aot_text import count_expanded_bytes
from jaxcompress.graph.cost._found import (
    COUNTED,
    PROGRAM,
    ROOFLINE,
    TPU_ESTIMATE,
    Compiled,
    Cost,
    Figure,
    Memory,
    SiteCost,
)
from jaxcompress.graph.cost._targets import Target, resolve
from jaxcompress.graph.sites._graph import Contraction, Graph, describe_stored
from jaxcompress.graph.sites._replay import call
from jaxcompress.graph.sites._sites import Site
from jaxcompress.graph.sites._trace import Traced, capture, trace
from jaxcompress.tree import LeafNode, bits_of


def cost(
    fn: Callable[..., Any] | Traced,
    params: tree.Params = None,
    *inputs: Any,
    target: Target | str | None = None,
    donate: Sequence[int] = (),
) -> Cost:
    """Count what one call of fn costs, and compile it for a target to estimate memory and time.

    Nothing is run and no arrays are made: pass `jax.ShapeDtypeStruct`s (and `QArray`s of them,
    from `jax.eval_shape`) to cost a model of any size. With a target, fn is compiled for it ahead
    of time; no such device is needed, but its compiler is: `pip install 'jaxcompress[tpu]'` or
    `'jaxcompress[cuda12]'`. A program with scans compiles twice more per kind of scan, because XLA
    counts the body of a loop once, however often it runs.

    Without a card XLA cannot time CUDA kernels, so it takes the first ones that fit: the program
    may be slower than the one that it would choose on the card.

    The figures are for one device. Arguments with a `NamedSharding` on the target's own mesh
    (`Target.mesh`) are compiled so, the others replicated on that mesh; if no argument has one,
    the program is compiled for one device.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure; or a `Traced`, without arguments.
        params: Any pytree of arrays, perhaps abstract.
        *inputs: fn's other arguments, perhaps abstract.
        target: A `Target` or its name (see `Target.named`): `"cpu"`, `"tpu-v5e"`,
            `"tpu-v5e:4x4"`, `"h200"`; `None` counts from the jaxpr alone.
        donate: Which of inputs, counted from 0, fn may overwrite: a cache, a state.

    Returns:
        The cost. One that does not fit the target's memory says so in `Cost.fits`.

    Raises:
        MissingExtraError: If the target's compiler is not installed.
        ArgumentError: If the target is not known, or the inputs are sharded on other devices.
        ArgumentTypeError: If fn cannot be traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
        >>> x = jax.ShapeDtypeStruct((8, 8192), jnp.bfloat16)
        >>> found = cost(lambda p, x: x @ p["w"], {"w": w}, x)
        >>> found.flops, found.param_bytes
        (1073741824, 134217728)
        >>> mine = Target(name="mine", platform="cpu", rates={"bfloat16": 1e12}, bandwidth=1e11)
        >>> small = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
        >>> cost(lambda w, x: x @ w, small, small, target=mine).compiled.seconds.origin
        'roofline from published peaks'
    """
    traced = capture(fn, params, *inputs)
    run, args = _runnable(fn, params, inputs, traced)
    for index in donate:
        if not 0 <= index < len(args) - 1:
            raise ArgumentError(
                "donate",
                got=repr(index),
                expected=f"indices of the {len(args) - 1} inputs, params not counted",
                fix="Leave it out if nothing may be overwritten.",
            )
    params, graph = args[0], trace(traced)
    compiled = None
    if target is not None:
        chosen = resolve(target)
        outcome = compile_for(run, args, chosen, [index + 1 for index in donate])
        compiled = _make_compiled(chosen, outcome, graph)
    contractions = (*graph.sites, *graph.elsewhere)
    return Cost(
        params=tree.count(params),
        param_bytes=tree.nbytes(params),
        flops=graph.flops,
        bytes=sum(one.bytes for one in contractions),
        sites=tuple(_site_cost(site, graph.leaves[site.path]) for site in graph.sites),
        elsewhere_flops=sum(one.flops for one in graph.elsewhere),
        bounded=all(one.bounded for one in contractions),
        compiled=compiled,
    )


def _runnable(
    fn: Callable[..., Any] | Traced, params: tree.Params, inputs: Sequence[Any], traced: Traced
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Give a function to compile and its arguments: fn itself, or what was captured of it."""
    if not isinstance(fn, Traced):
        return fn, (params, *inputs)
    params, inputs, kwargs = traced.args

    def run(params: tree.Params, *given: Any) -> Any:
        named = dict(zip(kwargs, given[len(inputs) :], strict=True))
        return call(traced, params, given[: len(inputs)], named)

    # The same function each time, so that the same call compiles once.
    return traced.derive("run", lambda: run), (params, *inputs, *kwargs.values())


def _site_cost(site: Site, leaf: Any) -> SiteCost:
    return SiteCost(
        name=site.name,
        primitive=site.primitive,
        shape=tuple(leaf.shape),
        stored=describe_stored(leaf),
        params=math.prod(leaf.shape),
        param_bytes=tree.nbytes(leaf),
        flops=site.flops,
        bytes=site.bytes,
        repeats=site.repeats,
    )


def _make_compiled(target: Target, outcome: Outcome, graph: Graph) -> Compiled:
    told = TPU_ESTIMATE if target.platform == "tpu" else PROGRAM
    figures = {
        key: Figure(value=value, unit=unit, origin=told)
        for key, unit in (("flops", "FLOP"), ("bytes", "B"), ("seconds", "s"))
        if (value := outcome.figures.get(key)) is not None
    }
    memory = Memory.of(outcome, told)
    expanded = _find_expanded(outcome.program, graph)
    moved = figures.get("bytes") or _least_traffic(graph, memory, expanded, outcome.devices)
    peak = memory.peak and memory.peak.value
    fits = None
    if outcome.refusal:
        fits = False
    elif target.memory is not None and peak is not None:
        fits = peak <= target.memory
    return Compiled(
        target=target,
        devices=outcome.devices,
        memory=memory,
        flops=figures.get("flops"),
        bytes=moved,
        seconds=None
        if outcome.refusal
        else figures.get("seconds") or _roofline(target, graph, moved, outcome.devices),
        fits=fits,
        refusal=outcome.refusal,
        expanded=expanded,
        program=outcome.program,
    )


def _least_traffic(
    graph: Graph, memory: Memory, expanded: Mapping[str, Figure], devices: int
) -> Figure | None:
    """Bound the traffic from below: arguments once (of a table the rows read), results once."""
    if memory.outputs is None:
        return None
    unread = 0
    for path, leaf in graph.leaves.items():
        sites = graph.sites_of(path)
        if sites and all(site.axes.lookup for site in sites) and not graph.uses.get(path):
            read = sum(site.bytes for site in sites)
            unread += max(0, tree.nbytes(leaf) - read)
    value = memory.arguments.value + memory.outputs.value - unread / devices
    for path, size in expanded.items():  # of one layer, written and read in each
        value += 2 * size.value * max(site.repeats for site in graph.sites_of(path))
    return Figure(value=max(value, 0.0), unit="B", origin=COUNTED)


def _roofline(target: Target, graph: Graph, moved: Figure | None, devices: int) -> Figure | None:
    """Take the longer of computing at the peak rates and moving the bytes at full bandwidth."""
    if moved is None or not target.bandwidth:
        return None
    busy = 0.0
    for contraction in (*graph.sites, *graph.elsewhere):
        if contraction.flops:
            rate = target.rate(_find_dtype(contraction))
            if rate is None:
                return None
            busy += contraction.flops / devices / rate
    seconds = max(busy, moved.value / target.bandwidth)
    return Figure(value=seconds, unit="s", origin=ROOFLINE)


def _find_dtype(contraction: Site | Contraction) -> Any:
    operands = (
        (contraction.activation, contraction.weight)
        if isinstance(contraction, Site)
        else contraction.operands
    )
    return max((operand.dtype for operand in operands), key=bits_of)


def _find_expanded(program: Any, graph: Graph) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    quantized = [s for s in graph.sites if isinstance(graph.leaves[s.path], LeafNode)]
    if program is None or not quantized:
        return found
    text = program.as_text()
    for site in quantized:
        shape = graph.leaves[site.path].shape
        rows = math.prod(shape[k] for k in site.axes.contract)
        layers = math.prod(shape[k] for k in site.axes.stacked)
        columns = math.prod(shape) // max(rows * layers, 1)
        size = count_expanded_bytes(text, rows, columns)
        if size and min(rows, columns) > 1:
            found[site.path] = Figure(value=size, unit="B", origin=PROGRAM)
    return found
