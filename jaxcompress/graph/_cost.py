"""What a function costs: counted from its jaxpr, and by the compiler of any target."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxcompress import tree
from jaxcompress.errors import ArgumentError
from jaxcompress.graph._aot import Outcome, compile_for
from jaxcompress.graph._aot_text import expanded_bytes
from jaxcompress.graph._cost_figures import (
    COUNTED,
    PROGRAM,
    ROOFLINE,
    TPU_ESTIMATE,
    Figure,
    Memory,
)
from jaxcompress.graph._graph import Contraction, Graph, stored
from jaxcompress.graph._sites import Site
from jaxcompress.graph._targets import Target, resolve
from jaxcompress.graph._text import plain
from jaxcompress.graph._trace import trace
from jaxcompress.tree import LeafNode, bits_of

if TYPE_CHECKING:
    import rich.console


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """What one site costs, counted from the jaxpr.

    Attributes:
        name: The site's name.
        primitive: The primitive's name.
        shape: The leaf's shape.
        stored: How the leaf is stored: a dtype, or the integer and scale dtypes of a `QArray`.
        params: Entries of the leaf; a leaf with several sites is listed at each.
        param_bytes: Bytes of the leaf as stored.
        flops: Floating point operations over all repeats, 2 per multiply-add.
        bytes: Bytes over all repeats: weight, activation and result.
        repeats: How often it runs in one call.
    """

    name: str
    primitive: str
    shape: tuple[int, ...]
    stored: str
    params: int
    param_bytes: int
    flops: int
    bytes: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a target's compiler made of a function. Figures are for one device.

    Attributes:
        target: What it was compiled for.
        devices: How many devices run the program together.
        memory: Bytes by kind.
        flops: Operations that the program executes, loop bodies as often as they run; `None` where
            the compiler does not say, or scans are inside a `shard_map` or on explicit axes.
        bytes: Bytes that the program moves to and from memory; where the compiler does not say, a
            lower bound: each argument read once, each result written once, each `expanded` weight
            written and read.
        seconds: Time of one call: the TPU compiler's estimate, elsewhere the roofline
            `max(flops / peak rate, bytes / bandwidth)`. Neither is a measurement. `None` where
            the target has no published figures.
        fits: Whether the program fits the target's memory; `None` where that is not known.
        refusal: What the compiler said if it does not fit.
        expanded: `{path: bytes}` of quantized leaves that the program dequantizes to a whole float
            array in memory (one layer of it at a time if scanned) rather than inside the matmul.
        program: The `jax.stages.Compiled` itself, for `as_text()`; `None` if it was refused.
    """

    target: Target
    devices: int
    memory: Memory
    flops: Figure | None
    bytes: Figure | None
    seconds: Figure | None
    fits: bool | None
    refusal: str
    expanded: Mapping[str, Figure]
    program: Any = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Give everything but the program as plain values.

        Returns:
            A mapping that `json.dumps` takes; every figure has its unit and origin beside it.
        """
        return {
            "target": self.target.name,
            "devices": self.devices,
            "memory": self.memory.as_dict(),
            "flops": _plain(self.flops),
            "bytes": _plain(self.bytes),
            "seconds": _plain(self.seconds),
            "fits": self.fits,
            "refusal": self.refusal,
            "expanded": {path: figure.as_dict() for path, figure in self.expanded.items()},
            "peaks": {
                "rates": dict(self.target.rates),
                "bandwidth": self.target.bandwidth,
                "memory": self.target.memory,
                "source": self.target.source,
            },
        }


def _plain(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else figure.as_dict()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a function costs. Its own figures are jaxpr counts; `compiled` has the compiler's.

    Attributes:
        params: Entries of all leaves, each leaf once.
        param_bytes: Bytes of all leaves as stored; int4 takes half a byte.
        flops: Of all contractions, 2 per multiply-add; a `cond` counts its costliest branch, a
            `while` loop of unknown length one iteration.
        bytes: Bytes that all contractions read and write if nothing stays in cache between them.
        sites: One entry per site, in the order in which they run.
        elsewhere_flops: The part of `flops` without a leaf: attention scores.
        bounded: `False` if a `while` loop of unknown length was counted once.
        compiled: What the target's compiler says; `None` without a target.
    """

    params: int
    param_bytes: int
    flops: int
    bytes: int
    sites: tuple[SiteCost, ...]
    elsewhere_flops: int
    bounded: bool
    compiled: Compiled | None = None

    @property
    def seconds(self) -> float | None:
        """The estimated seconds of one call; `compiled.seconds` says whose estimate that is."""
        figure = self.compiled and self.compiled.seconds
        return figure.value if figure else None

    @property
    def fits(self) -> bool | None:
        """Whether it fits the target's memory; `None` if that is not known."""
        return self.compiled.fits if self.compiled else None

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain values.

        Returns:
            A mapping that `json.dumps` takes; every total has its unit and origin beside it.
        """
        totals = {
            "params": Figure(value=self.params, unit="entries", origin=COUNTED),
            "param_bytes": Figure(value=self.param_bytes, unit="B", origin=COUNTED),
            "flops": Figure(value=self.flops, unit="FLOP", origin=COUNTED),
            "elsewhere_flops": Figure(value=self.elsewhere_flops, unit="FLOP", origin=COUNTED),
            "bytes": Figure(value=self.bytes, unit="B", origin=COUNTED),
        }
        return {
            **{key: figure.as_dict() for key, figure in totals.items()},
            "bounded": self.bounded,
            "sites": [{**vars(site), "shape": list(site.shape)} for site in self.sites],
            "compiled": self.compiled.as_dict() if self.compiled else None,
        }

    def __rich__(self) -> "rich.console.Group":
        from jaxcompress.graph import _cost_table  # loads rich

        return _cost_table.draw(self)

    def __str__(self) -> str:
        return plain(self)


def cost(
    fn: Callable[..., Any],
    params: tree.Params,
    *inputs: Any,
    target: Target | str | None = None,
    donate: Sequence[int] = (),
) -> Cost:
    """Count what one call of fn costs, and have a target's compiler say what it makes of it.

    Nothing is run and no arrays are made: pass `jax.ShapeDtypeStruct`s (and `QArray`s of them,
    from `jax.eval_shape`) to cost a model of any size. With a target, fn is compiled for it ahead
    of time; no such device is needed, but its compiler is: `pip install 'jaxcompress[tpu]'` or
    `'jaxcompress[cuda12]'`. A program with scans compiles twice more per kind of scan, because XLA
    counts the body of a loop once, however often it runs.

    Without a card XLA cannot time CUDA kernels: the program is its first choice, and may be worse
    than the one that it would run there.

    The figures are for one device. Arguments with a `NamedSharding` on the target's own mesh
    (`Target.mesh`) are compiled so, the others replicated on that mesh; if no argument has one,
    the program is compiled for one device.

    Args:
        fn: `fn(params, *inputs) -> outputs`, pure.
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
    for index in donate:
        if not 0 <= index < len(inputs):
            raise ArgumentError(
                "donate",
                got=repr(index),
                expected=f"indices of the {len(inputs)} inputs, params not counted",
                fix="Leave it out if nothing may be overwritten.",
            )
    chosen = None if target is None else resolve(target)
    graph = trace(fn, params, *inputs)
    compiled = None
    if chosen is not None:
        outcome = compile_for(fn, (params, *inputs), chosen, [index + 1 for index in donate])
        compiled = _compiled(chosen, outcome, graph)
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


def _site_cost(site: Site, leaf: Any) -> SiteCost:
    return SiteCost(
        name=site.name,
        primitive=site.primitive,
        shape=tuple(leaf.shape),
        stored=stored(leaf),
        params=math.prod(leaf.shape),
        param_bytes=tree.nbytes(leaf),
        flops=site.flops,
        bytes=site.bytes,
        repeats=site.repeats,
    )


def _compiled(target: Target, outcome: Outcome, graph: Graph) -> Compiled:
    told = TPU_ESTIMATE if target.platform == "tpu" else PROGRAM
    figures = {
        key: Figure(value=value, unit=unit, origin=told)
        for key, unit in (("flops", "FLOP"), ("bytes", "B"), ("seconds", "s"))
        if (value := outcome.figures.get(key)) is not None
    }
    memory = Memory.of(outcome, told)
    expanded = _expanded(outcome.program, graph)
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
            rate = target.rate(_multiplied_dtype(contraction))
            if rate is None:
                return None
            busy += contraction.flops / devices / rate
    seconds = max(busy, moved.value / target.bandwidth)
    return Figure(value=seconds, unit="s", origin=ROOFLINE)


def _multiplied_dtype(contraction: Site | Contraction) -> Any:
    operands = (
        (contraction.activation, contraction.weight)
        if isinstance(contraction, Site)
        else contraction.operands
    )
    return max((operand.dtype for operand in operands), key=bits_of)


def _expanded(program: Any, graph: Graph) -> dict[str, Figure]:
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
        size = expanded_bytes(text, rows, columns)
        if size and min(rows, columns) > 1:
            found[site.path] = Figure(value=size, unit="B", origin=PROGRAM)
    return found
