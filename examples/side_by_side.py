"""Models beside the one that they come from: the same examples, paired differences."""

import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import export, quantize, report, structured, tree
from jaxcompress.numerics import QArray
from jaxcompress.train import metrics


@dataclass(kw_only=True)
class SideBySide:
    """Collects one row per model, each compared with the first on the same examples.

    Attributes:
        fn: `(params, batch) -> logits (examples, classes)`.
        batches: Inputs, of one shape.
        labels: The classes of all examples, in order.
        folder: Where to write the files, whose sizes are reported.
        bits: Whether cross-entropies are bits per character, rather than nats.
        repeats: Timed calls on the first batch.
        seed: Seeds the bootstrap.
        rows: The rows so far.
    """

    fn: Callable[[Any, Any], jax.Array]
    batches: Sequence[Any]
    labels: np.ndarray
    folder: pathlib.Path
    bits: bool = False
    repeats: int = 5
    seed: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    _first: Any = None

    def add(
        self,
        name: str,
        params: Any,
        *,
        fn: Callable[[Any, Any], jax.Array] | None = None,
        note: str = "",
    ) -> metrics.Comparison:
        """Save, reload, run what was reloaded by its codes, and compare.

        Args:
            name: The row's name.
            params: Params, of arrays or of `QArray`s.
            fn: What to run in place of `self.fn`: the function with its BatchNorm folded, say.
            note: A remark.

        Returns:
            The comparison with the first model; its cross-entropies are nats.
        """
        file = name.replace(" ", "-").replace("/", "-")
        saved = export.save(self.folder / f"{file}.safetensors", params)
        params = jax.device_put(export.load(saved.path).params)
        run = fn or self.fn
        quantized = any(isinstance(leaf, QArray) for _, leaf in tree.items(params))
        predict = jax.jit(quantize.execute(run) if quantized else run)
        logits = jnp.concatenate([predict(params, batch) for batch in self.batches])
        logits = logits.astype(jnp.float32)
        self._first = logits if self._first is None else self._first
        key = jax.random.key(self.seed)
        against = metrics.compare(self._first, logits, self.labels, key=key)
        unit = math.log(2) if self.bits else 1.0
        loss = against.cross_entropy
        row: dict[str, Any] = {"model": name}
        if not self.bits:
            row["accuracy"] = against.accuracies[1]
        row["bits" if self.bits else "cross_entropy"] = against.cross_entropies[1] / unit
        row["Δ"] = loss.value / unit
        row["95 %"] = f"[{loss.low / unit:+.3f}, {loss.high / unit:+.3f}]"
        row["agreement"] = against.agreement.value
        row["bytes"] = saved.bytes
        row["latency"] = report.latency(
            predict, params, self.batches[0], repeats=self.repeats, warmup=1
        ).median
        row["note"] = note
        self.rows.append(row)
        print(
            f"{name:28} {against.cross_entropies[1] / unit:.4f} {row['95 %']}  "
            f"{against.agreement.value:.1%} alike  {saved.bytes:,} bytes",
            flush=True,
        )
        return against

    def table(self, title: str) -> report.Table:
        """Make the table of the rows.

        Args:
            title: A heading.

        Returns:
            The table.
        """
        keys = [key for key in self.rows[0] if any(row[key] not in ("", None) for row in self.rows)]
        columns = [report.Column(key=k, versus="ratio") if k == "bytes" else k for k in keys]
        return report.table(self.rows, columns=columns, title=title)


def certified(certificate: structured.Certificate, title: str = "Certificate") -> report.Section:
    """Make a report's section of a certificate.

    Args:
        certificate: From `structured.shrink` or `drop_layers`.
        title: A heading.

    Returns:
        Its distances, what explains them, and sizes.
    """
    measured = {"given": certificate.given, "random": certificate.random}
    distances = [
        {
            "inputs": name,
            "to fn re-masked": str(found.structural),
            "to masked params": str(found.weights),
            "to dense": str(found.dense),
        }
        for name, found in measured.items()
        if found is not None
    ]
    sizes = [
        {"": name, "params": size.params, "bytes": size.bytes, "FLOPs": size.flops}
        for name, size in (("before", certificate.before), ("after", certificate.after))
    ]
    verdict = "holds" if certificate.holds else "does not hold"
    leaks = [
        f"{leak.where or 'fn'}: {leak.primitive} of masked params sees removed indices, "
        f"which moves outputs by {leak.effect:.1e}"
        for leak in certificate.leaks
    ]
    text = (
        f"The certificate {verdict}: relative distances of outputs; that to fn re-masked is the "
        f"surgery's, and may be {certificate.tolerance:.0e}."
    )
    return report.Section(
        title=title, parts=(text, report.table(distances), *leaks, report.table(sizes))
    )


def remarks(result: quantize.QResult) -> str:
    """Say in a few words where a quantization could not follow its rule.

    Args:
        result: What `quantize.ptq` gave.

    Returns:
        Words; empty if every site has a quantized weight, in groups of the size asked for.
    """
    left, words = len(result.report.untouched), []
    regrouped = sum(any("group" in note for note in leaf.notes) for leaf in result.report.leaves)
    if left:
        words.append(f"{left} sites in float32")
    if regrouped:
        words.append(f"{regrouped} in other groups")
    return ", ".join(words)
