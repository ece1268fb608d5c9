"""What a factorisation did, leaf by leaf."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxcompress import text, tree


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
        return tree.look_up(self.leaves, path, done="factorised", why_not=self._explain(path))

    def _explain(self, path: str) -> str:
        if path in self.exempt:
            return f"was left alone: it {self.exempt[path]}"
        if path in self.kept:
            return "was left whole within the budget"
        return "was not selected" if path in self.unselected else "is no leaf of params"

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The decision as data, `{path: ranks}`: what `Ranks` takes."""
        return {leaf.path: leaf.ranks for leaf in self.leaves}

    def __str__(self) -> str:
        """Draw the table."""
        numbers = ("rank", "of", "weights off", "outputs off", "params", "FLOPs")
        table = text.grid(("leaf", "method"), numbers)
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
        return "\n".join([text.render_plain(table), "", *self._remarks()])

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
