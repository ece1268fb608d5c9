"""What a post-training quantization did, leaf by leaf and site by site."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxcompress import text, tree
from jaxcompress.numerics import Format
from jaxcompress.quantize._execute import SiteKernel


@dataclass(frozen=True, kw_only=True)
class QLeaf:
    """One quantized leaf.

    Attributes:
        path: Its path.
        format: Its format, with the leaf's own axes.
        activations: The format of the activations that it meets; `None` if they stay as they are.
        static: Whether their range is settled.
        method: The name of the method that chose the codes.
        bytes_before: Bytes of the array.
        bytes: Bytes of the stored form.
        weight_sqnr: Signal-to-quantization-noise ratio of the weights, dB.
        output_sqnr: `{Site.name: dB}`: of each site's result on the first batch, with the site's
            activation as it is in fn. Sites that were not run by codes and the condition or body
            of a `while` loop have none.
        kernels: What `execute` runs where the leaf is read.
        notes: What was done otherwise than the rule says, and why.
        diagnostics: What the method says of itself, by name: the worst over matrices.
    """

    path: str
    format: Format
    activations: Format | None
    static: bool
    method: str
    bytes_before: int
    bytes: int
    weight_sqnr: float
    output_sqnr: Mapping[str, float] = field(default_factory=dict)
    kernels: tuple[SiteKernel, ...] = ()
    notes: tuple[str, ...] = ()
    diagnostics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QReport:
    """What `ptq` did; `print` shows it as a table.

    Every leaf is in exactly one of `leaves`, `excluded`, `unselected` and `exempt`.

    Attributes:
        leaves: The quantized leaves, in traversal order.
        excluded: Paths of the leaves that a rule with `weights=None` leaves alone.
        unselected: Paths of the leaves that no rule selects.
        exempt: `{path: reason}` of the leaves that could not follow their rule.
        unused_rules: Numbers of the rules that decided no leaf.
        untouched: `{Site.name: reason}` of the sites whose weight stays as it is.
        bytes_before: Bytes of params.
        bytes: Bytes of the quantized params.
    """

    leaves: tuple[QLeaf, ...]
    excluded: tuple[str, ...] = ()
    unselected: tuple[str, ...] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)
    unused_rules: tuple[int, ...] = ()
    untouched: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int
    bytes: int

    def __getitem__(self, path: str) -> QLeaf:
        """Look a quantized leaf up by its path.

        Args:
            path: Its path.

        Returns:
            What was done to it.

        Raises:
            KeyError: If no such leaf was quantized; it says why, or names the nearest paths.
        """
        return tree.look_up(self.leaves, path, done="quantized", why_not=self._explain(path))

    def _explain(self, path: str) -> str:
        if path in self.exempt:
            return f"was left alone: it {self.exempt[path]}"
        if path in self.excluded:
            return "was left alone by a rule with weights=None"
        return "was selected by no rule" if path in self.unselected else "is no leaf of params"

    @property
    def fallbacks(self) -> tuple[SiteKernel, ...]:
        """The places where a quantized leaf is dequantized before use, with the reasons."""
        uses = [use for leaf in self.leaves for use in leaf.kernels]
        return tuple(use for use in uses if use.kernel == "dequantized")

    def __str__(self) -> str:
        """Draw the table."""
        words = ("leaf", "format", "activations", "method", "kernel")
        table = text.grid(words, ("weights [dB]", "output [dB]", "bytes"))
        for leaf in self.leaves:
            activations = "" if leaf.activations is None else name_format(leaf.activations)
            worst = min(leaf.output_sqnr.values(), default=None)
            table.add_row(
                leaf.path,
                name_format(leaf.format),
                f"{activations} static" if leaf.static else activations,
                leaf.method,
                ", ".join(dict.fromkeys(use.kernel for use in leaf.kernels)),
                f"{leaf.weight_sqnr:.1f}",
                "" if worst is None else f"{worst:.1f}",
                f"{leaf.bytes_before / leaf.bytes:.1f}x",
            )
        return "\n".join([text.render_plain(table), "", *self._remarks()])

    def _remarks(self) -> list[str]:
        whole = f"{self.bytes_before:,} bytes -> {self.bytes:,}"
        lines = [f"{whole} ({self.bytes_before / max(self.bytes, 1):.2f}x)"]
        lines += [f"{leaf.path}: {note}" for leaf in self.leaves for note in leaf.notes]
        lines += [f"{use.path}: dequantized, since {use.why}" for use in self.fallbacks]
        lines += [f"{path}: left alone, it {reason}" for path, reason in self.exempt.items()]
        lines += [f"rule {number} decided no leaf" for number in self.unused_rules]
        return lines


def name_format(format: Format) -> str:
    """Name a format in a word or two, such as `int4 PerGroup(128)`.

    Args:
        format: The format.

    Returns:
        The words.
    """
    granularity: Any = format.granularity
    size = getattr(granularity, "size", None)
    kind = type(granularity).__name__ + (f"({size})" if size else "")
    return f"{format.qtype.name} {kind}" + ("" if format.symmetric else " asymmetric")
