"""A cost as tables for the terminal."""

from typing import TYPE_CHECKING, Any

import rich.console
import rich.table
import rich.text

from jaxcompress.graph._text import grid, scaled

if TYPE_CHECKING:
    from jaxcompress.graph.cost._cost import Compiled, Cost
    from jaxcompress.graph.cost._figures import Figure

SHOWN = 16
"""The table lists so many sites, the costliest; the others are summed in one row."""


def draw(cost: "Cost") -> rich.console.Group:
    """Draw a cost: its sites, its totals, and what the compiler says."""
    parts: list[Any] = [_sites(cost), rich.text.Text()]
    parts.append(_totals(cost))
    if not cost.bounded:
        parts.append(rich.text.Text("A while loop of unknown length was counted once."))
    if cost.compiled is not None:
        parts += [rich.text.Text(line) for line in _remarks(cost.compiled)]
    return rich.console.Group(*parts)


def _sites(cost: "Cost") -> rich.table.Table:
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
                scaled(site.params, ""),
                scaled(site.param_bytes, "B"),
                scaled(site.flops, ""),
                share(site.flops),
            )
    rest = [site for site in cost.sites if site not in shown]
    if rest:
        flops = sum(site.flops for site in rest)
        table.add_row(
            f"… {len(rest)} more sites", "", "", "", "", "", scaled(flops, ""), share(flops)
        )
    if cost.elsewhere_flops:
        flops = cost.elsewhere_flops
        table.add_row("without a leaf", "", "", "", "", "", scaled(flops, ""), share(flops))
    table.add_section()
    params, size = scaled(cost.params, ""), scaled(cost.param_bytes, "B")
    table.add_row("all leaves", "", "", "", params, size, scaled(cost.flops, ""), "")
    return table


def _totals(cost: "Cost") -> rich.table.Table:
    table = grid(["figure"], ["value", "origin"])
    table.add_row("FLOPs", scaled(cost.flops, "FLOP"), "jaxpr count")
    table.add_row("bytes of all contractions", scaled(cost.bytes, "B"), "jaxpr count")
    compiled = cost.compiled
    if compiled is None:
        return table
    table.add_section()
    memory, each = compiled.memory, " per device" if compiled.devices > 1 else ""
    rows: list[tuple[str, Figure | None]] = [
        (f"time{each}", compiled.seconds),
        (f"FLOPs{each}", compiled.flops),
        (f"bytes moved{each}", compiled.bytes),
        (f"arguments{each}", memory.arguments),
        (f"outputs{each}", memory.outputs),
        (f"temporaries{each}", memory.temporaries),
        (f"aliased{each}", memory.aliased),
        (f"code{each}", memory.code),
        (f"peak{each}", memory.peak),
    ]
    for name, figure in rows:
        if figure is not None:
            table.add_row(name, scaled(figure.value, figure.unit), figure.origin)
    return table


def _remarks(compiled: "Compiled") -> list[str]:
    target = compiled.target
    devices = f", {compiled.devices} devices" if compiled.devices > 1 else ""
    lines = [f"Target {target.name}{devices}. {target.source}".strip()]
    if compiled.fits is not None and target.memory is not None:
        verb = "fits" if compiled.fits else "DOES NOT FIT"
        lines.append(f"It {verb} the {scaled(target.memory, 'B')} of one device.")
    if compiled.refusal:
        lines.append(compiled.refusal)
    for path, size in compiled.expanded.items():
        lines.append(
            f"{path} is dequantized to a whole array in memory: {scaled(size.value, 'B')}."
        )
    return lines
