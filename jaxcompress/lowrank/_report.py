"""What a factorisation did, leaf by leaf."""

import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxcompress import tree


@dataclass(frozen=True, kw_only=True)
class FactorizedLeaf:
    """One factorised leaf.

    Attributes:
        path: Its path.
        method: The name of the method.
        ranks: Its rank; for Tucker-2 those of inputs and outputs.
        break_even: The highest ranks that would have saved anything.
        params_before: Entries of the array.
        params: Entries of the factors.
        flops_before: Operations of its sites in one call of fn.
        flops: The same by factors.
        weight_error: `‖W - Ŵ‖ / ‖W‖`.
        output_error: `‖X (W - Ŵ)‖ / ‖X W‖` over the batches, for a method that looks at them.
    """

    path: str
    method: str
    ranks: tuple[int, ...]
    break_even: tuple[int, ...]
    params_before: int
    params: int
    flops_before: int
    flops: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class LowRankReport:
    """What `factorize` did; `print` shows it as a table.

    Every leaf is in exactly one of `leaves`, `kept`, `unselected` and `exempt`.

    Attributes:
        leaves: The factorised leaves, in traversal order.
        kept: Paths of the leaves that could have been, and that the budget left whole.
        unselected: Paths of the leaves that `where` does not select.
        exempt: `{path: reason}` of the selected leaves that could not be factorised.
        params_before: Entries of params.
        params: Entries that are left.
        bytes_before: Bytes of params.
        bytes: Bytes that are left.
        flops_before: Operations of the contractions of one call of fn.
        flops: The same of `execute(fn)`.
        seconds: The estimate of one call before and after, where the budget is one.
    """

    leaves: tuple[FactorizedLeaf, ...]
    kept: tuple[str, ...]
    unselected: tuple[str, ...]
    exempt: Mapping[str, str]
    params_before: int
    params: int
    bytes_before: int
    bytes: int
    flops_before: int
    flops: int
    seconds: tuple[float, float] | None = field(default=None)

    def __getitem__(self, path: str) -> FactorizedLeaf:
        """Look a factorised leaf up by its path.

        Args:
            path: Its path.

        Returns:
            What was done to it.

        Raises:
            KeyError: If no such leaf was factorised; it says why, or names the nearest paths.
        """
        found = {leaf.path: leaf for leaf in self.leaves}
        if path in found:
            return found[path]
        why = "is no leaf of params"
        if path in self.exempt:
            why = f"was left alone: it {self.exempt[path]}"
        elif path in self.kept:
            why = "was left whole within the budget"
        elif path in self.unselected:
            why = "was not selected"
        near = difflib.get_close_matches(path, found, n=3, cutoff=0.3) or list(found)
        raise KeyError(f"{path!r} {why}; factorised are, for example: {tree.shorten(near)}")

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The decision as data, `{path: ranks}`: what `Ranks` takes."""
        return {leaf.path: leaf.ranks for leaf in self.leaves}

    def __str__(self) -> str:
        """Draw the table."""
        import rich.box
        import rich.console
        import rich.table

        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for name in ("leaf", "method"):
            table.add_column(name)
        for name in ("rank", "of", "weights off", "outputs off", "params", "FLOPs"):
            table.add_column(name, justify="right")
        for leaf in self.leaves:
            table.add_row(
                leaf.path,
                leaf.method,
                "+".join(map(str, leaf.ranks)),
                "+".join(map(str, leaf.break_even)),
                f"{leaf.weight_error:.1%}",
                "" if leaf.output_error is None else f"{leaf.output_error:.1%}",
                f"{leaf.params_before / leaf.params:.2f}x",
                f"{leaf.flops_before / leaf.flops:.2f}x",
            )
        file = io.StringIO()
        console = rich.console.Console(file=file, width=160, color_system=None)
        console.print(table)
        for line in self._remarks():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def _remarks(self) -> list[str]:
        lines = [
            f"params {self.params_before:,} -> {self.params:,}, bytes {self.bytes_before:,} -> "
            f"{self.bytes:,}, FLOPs {self.flops_before:,} -> {self.flops:,}"
        ]
        if self.seconds is not None:
            lines.append("estimated seconds {:.3g} -> {:.3g}".format(*self.seconds))
        lines += [f"{path}: left whole within the budget" for path in self.kept]
        lines += [f"{path}: left alone, it {reason}" for path, reason in self.exempt.items()]
        return lines
