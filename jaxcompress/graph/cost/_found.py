"""What a cost is: figures with their origin, and tables of them for the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from jaxcompress.graph.cost._aot import Outcome
from jaxcompress.graph.cost._targets import Target
from jaxcompress.text import grid, render_plain, write_scaled

if TYPE_CHECKING:
    import rich.console
    import rich.table

COUNTED = "jaxpr count"
TPU_ESTIMATE = "TPU compiler estimate"
PROGRAM = "compiled program"
ROOFLINE = "roofline from published peaks"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number, its unit, and where it comes from.

    Attributes:
        value: The number.
        unit: `"FLOP"`, `"B"`, `"s"` or `"entries"`.
        origin: `"jaxpr count"`, `"TPU compiler estimate"`, `"compiled program"` or
            `"roofline from published peaks"`.
    """

    value: float
    unit: str
    origin: str

    def __float__(self) -> float:
        return float(self.value)

    def as_dict(self) -> dict[str, Any]:
        """Give the fields as plain values.

        Returns:
            A mapping with `value`, `unit` and `origin`.
        """
        return {"value": self.value, "unit": self.unit, "origin": self.origin}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a program needs on one device, by kind; `None` where the compiler refused it.

    Attributes:
        arguments: Arguments; those that fn does not read are dropped.
        outputs: Results.
        temporaries: What lives only while it runs.
        aliased: Results that overwrite donated arguments.
        code: The program itself; 0 where the compiler does not say.
        peak: arguments + outputs + temporaries - aliased, or what a compiler that refused says
            it would need.
    """

    arguments: Figure
    outputs: Figure | None = None
    temporaries: Figure | None = None
    aliased: Figure | None = None
    code: Figure | None = None
    peak: Figure | None = None

    @staticmethod
    def of(outcome: Outcome, told: str) -> "Memory":
        """Read a compiler's outcome.

        Args:
            outcome: The outcome.
            told: The origin of a figure that the compiler estimates.

        Returns:
            The bytes.
        """

        def figure(value: float, origin: str = PROGRAM) -> Figure:
            return Figure(value=value, unit="B", origin=origin)

        if outcome.program is None:
            needed = outcome.required
            return Memory(
                arguments=figure(outcome.arguments, COUNTED),
                peak=None if needed is None else figure(needed, told),
            )
        stats = outcome.program.memory_analysis()
        arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
        temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
        return Memory(
            arguments=figure(arguments),
            outputs=figure(outputs),
            temporaries=figure(temporaries),
            aliased=figure(aliased),
            code=figure(stats.generated_code_size_in_bytes),
            peak=figure(arguments + outputs + temporaries - aliased),
        )

    def as_dict(self) -> dict[str, Any]:
        """Give the kinds as plain values.

        Returns:
            `{kind: figure or None}`.
        """
        return {kind.name: _figure_to_dict(getattr(self, kind.name)) for kind in fields(self)}


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
    """What a target's compiler reports about a function. Figures are for one device.

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
            "flops": _figure_to_dict(self.flops),
            "bytes": _figure_to_dict(self.bytes),
            "seconds": _figure_to_dict(self.seconds),
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


def _figure_to_dict(figure: Figure | None) -> dict[str, Any] | None:
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
        units = {"params": "entries", "param_bytes": "B", "flops": "FLOP"}
        units |= {"elsewhere_flops": "FLOP", "bytes": "B"}
        totals = {
            key: Figure(value=getattr(self, key), unit=unit, origin=COUNTED).as_dict()
            for key, unit in units.items()
        }
        return {
            **totals,
            "bounded": self.bounded,
            "sites": [{**vars(site), "shape": list(site.shape)} for site in self.sites],
            "compiled": self.compiled.as_dict() if self.compiled else None,
        }

    def __rich__(self) -> "rich.console.Group":
        return _draw_cost(self)

    def __str__(self) -> str:
        return render_plain(self)


# --- tables ---------------------------------------------------------------------------------------

SHOWN = 16
"""The table lists so many sites, the costliest; the others are summed in one row."""


def _draw_cost(cost: Cost) -> "rich.console.Group":
    """Draw a cost: its sites, its totals, and what the compiler says."""
    import rich.console
    import rich.text

    parts: list[Any] = [_sites(cost), rich.text.Text()]
    parts.append(_totals(cost))
    if not cost.bounded:
        parts.append(rich.text.Text("A while loop of unknown length was counted once."))
    if cost.compiled is not None:
        parts += [rich.text.Text(line) for line in _remarks(cost.compiled)]
    return rich.console.Group(*parts)


def _sites(cost: Cost) -> "rich.table.Table":
    import rich.text

    table = grid(["site"], ["shape", "stored", "times", "params", "size", "FLOPs", "share"])
    order = sorted(cost.sites, key=lambda site: -site.flops)
    shown = set(order[:SHOWN]) if len(order) > SHOWN + 1 else set(order)
    share = lambda flops: f"{100 * flops / cost.flops:.1f} %" if cost.flops else "–"
    for site in cost.sites:
        if site in shown:
            table.add_row(
                rich.text.Text(site.name or "params"),  # params that are one array
                "×".join(map(str, site.shape)),
                site.stored,
                str(site.repeats),
                write_scaled(site.params, ""),
                write_scaled(site.param_bytes, "B"),
                write_scaled(site.flops, ""),
                share(site.flops),
            )
    rest = [site for site in cost.sites if site not in shown]
    if rest:
        flops = sum(site.flops for site in rest)
        table.add_row(
            f"… {len(rest)} more sites", "", "", "", "", "", write_scaled(flops, ""), share(flops)
        )
    if cost.elsewhere_flops:
        flops = cost.elsewhere_flops
        table.add_row("without a leaf", "", "", "", "", "", write_scaled(flops, ""), share(flops))
    table.add_section()
    params, size = write_scaled(cost.params, ""), write_scaled(cost.param_bytes, "B")
    table.add_row("all leaves", "", "", "", params, size, write_scaled(cost.flops, ""), "")
    return table


def _totals(cost: Cost) -> "rich.table.Table":
    table = grid(["figure"], ["value", "origin"])
    table.add_row("FLOPs", write_scaled(cost.flops, "FLOP"), "jaxpr count")
    table.add_row("bytes of all contractions", write_scaled(cost.bytes, "B"), "jaxpr count")
    compiled = cost.compiled
    if compiled is None:
        return table
    table.add_section()
    memory, each = compiled.memory, " per device" if compiled.devices > 1 else ""
    rows: list[tuple[str, Figure | None]] = [
        (f"time{each}", compiled.seconds),
        (f"FLOPs{each}", compiled.flops),
        (f"bytes moved{each}", compiled.bytes),
        *((f"{kind.name}{each}", getattr(memory, kind.name)) for kind in fields(memory)),
    ]
    for name, figure in rows:
        if figure is not None:
            table.add_row(name, write_scaled(figure.value, figure.unit), figure.origin)
    return table


def _remarks(compiled: Compiled) -> list[str]:
    target = compiled.target
    devices = f", {compiled.devices} devices" if compiled.devices > 1 else ""
    lines = [f"Target {target.name}{devices}. {target.source}".strip()]
    if compiled.fits is not None and target.memory is not None:
        verb = "fits" if compiled.fits else "DOES NOT FIT"
        lines.append(f"It {verb} the {write_scaled(target.memory, 'B')} of one device.")
    if compiled.refusal:
        lines.append(compiled.refusal)
    for path, size in compiled.expanded.items():
        lines.append(
            f"{path} is dequantized to a whole array in memory: {write_scaled(size.value, 'B')}."
        )
    return lines
