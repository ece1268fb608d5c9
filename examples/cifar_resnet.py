"""Compress a pretrained CIFAR-10 ResNet-20: prune, distil, quantize, pack, and compare in pairs.

    python examples/cifar_resnet.py            # the whole table, about half an hour on two cores
    python examples/cifar_resnet.py --quick    # the same path with a few steps each, two minutes

Reads `cifar10.npz` and `resnet20_cifar10.safetensors` from `$JAXCOMPRESS_DATA`, by default
`../shared/data` from the project's root.
"""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cifar
import jax
import numpy as np
import optax
import tyro
from cifar import Network, data_folder, load_network, normalise

from jaxcompress import export, numerics, quantize, report, sparsity, train
from jaxcompress.quantize import presets
from jaxcompress.train import metrics

INT4 = quantize.Policy(
    (
        quantize.Rule(
            weights=numerics.Format(numerics.int4, numerics.PerChannel(), range=numerics.MSE())
        ),
    )
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        quick: A few steps of each stage, to see that everything works.
        prune_epochs: Epochs of gradual pruning with distillation.
        quantize_epochs: Epochs of quantization-aware training, for each format.
        batch_size: Images per step.
        seed: Seeds the order of the images, their augmentation and the bootstrap.
        out: Where to write the packed files and the report.
        data: The folder with the data set and the pretrained network.
    """

    quick: bool = False
    prune_epochs: int = 24
    quantize_epochs: int = 8
    batch_size: int = 64
    seed: int = 0
    out: pathlib.Path = pathlib.Path("cifar-resnet")
    data: pathlib.Path = field(default_factory=data_folder)


def distil(
    network: Network,
    params: Any,
    data: train.Batches,
    *,
    steps: int,
    learning_rate: float,
    schedule: Callable[..., Any] | float | None = None,
    mask: Any = None,
    policy: quantize.Policy | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Train params to answer as the dense network does, pruned and rounded as they go.

    Returns:
        The params, and their mask (`None` without a schedule).
    """

    def pruned(tx: optax.GradientTransformation) -> Any:
        every = max(1, steps // 60)
        return sparsity.sparsify(tx, schedule=schedule, every=every, scope="global", within=mask)

    state = cifar.distil(
        network,
        network.forward_train,
        params,
        data,
        steps=steps,
        learning_rate=learning_rate,
        wrap=(lambda tx: tx) if schedule is None else pruned,
        seen=lambda params: quantize.fake_quant(params, policy) if policy else params,
        seed=seed,
    )
    if schedule is None:
        return state.params, None
    return state.params, sparsity.get_mask(state.opt_state)


@dataclass
class Table:
    """Collects one row per model, each compared with the dense one on the same images."""

    predict: Callable[..., jax.Array]
    pixels: np.ndarray
    labels: np.ndarray
    folder: pathlib.Path
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    dense: Any = None

    def add(self, name: str, params: Any, *, mask: Any = None) -> None:
        """Save, reload, and compare what was reloaded with the dense network."""
        saved = export.save(self.folder / f"{name}.safetensors", params, mask=mask)
        loaded = export.load(saved.path)
        logits = self.predict(loaded.params, self.pixels)
        self.dense = logits if self.dense is None else self.dense
        key = jax.random.key(self.seed)
        against = metrics.compare(self.dense, logits, self.labels, key=key)
        gain, loss = against.accuracy, against.cross_entropy
        zeros = sparsity.sparsity_of(quantize.unpack(loaded.params)).total
        self.rows.append(
            {
                "model": name,
                "accuracy": against.accuracies[1],
                "Δ accuracy, 95 %": f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
                "cross_entropy": against.cross_entropies[1],
                "Δ cross-entropy, 95 %": f"[{loss.low:+.3f}, {loss.high:+.3f}]",
                "agreement": against.agreement.value,
                "sparsity": zeros,
                "bytes": saved.bytes,
            }
        )
        print(f"{name:32} {against.accuracies[1]:.1%}  {against.cross_entropies[1]:.4f}")


def main(config: Config) -> None:
    images = np.load(config.data / "cifar10.npz")
    network = load_network(config.data)
    # Packed params are unpacked inside the compiled program: what is stored is what is passed.
    predict = jax.jit(lambda params, x: network.forward(quantize.unpack(params), normalise(x)))
    data = train.Batches(
        {"pixels": images["x_train"]}, batch_size=config.batch_size, seed=config.seed
    )
    table = Table(predict, images["x_test"], images["y_test"], config.out, config.seed)
    table.add("dense", network.params)

    for fraction in (0.5, 0.7, 0.8, 0.9):
        for scope in ("layer", "global"):
            mask = sparsity.make_mask(network.params, sparsity=fraction, scope=scope)
            pruned = sparsity.apply(network.params, mask)
            table.add(f"one-shot {fraction:.0%} {scope}", pruned, mask=mask)

    epoch = 8 if config.quick else data.steps_per_epoch
    steps = epoch * (3 if config.quick else config.prune_epochs)
    gradual = sparsity.schedules.cubic(0.8, begin=0, end=steps * 2 // 3)
    pruned, mask = distil(
        network,
        network.params,
        data,
        steps=steps,
        learning_rate=0.02,
        schedule=gradual,
        seed=config.seed,
    )
    table.add("gradual 80% + distilled", pruned, mask=mask)

    steps = epoch * (1 if config.quick else config.quantize_epochs)
    for bits, policy in ((8, presets.int8_weights), (4, INT4)):
        for name, start, kept in (("dense", network.params, None), ("80%", pruned, mask)):
            trained, new = distil(
                network,
                start,
                data,
                steps=steps,
                learning_rate=0.01,
                policy=policy,
                schedule=None if kept is None else 0.8,
                mask=kept,
                seed=config.seed,
            )
            table.add(f"{name} + int{bits} QAT", quantize.pack(trained, policy), mask=new)

    rows = report.table(table.rows, title="ResNet-20 on 500 CIFAR-10 test images")
    rows.to_json(config.out / "results.json")
    tradeoff = report.plot_tradeoff(
        [
            report.Point(label=row["model"], bytes=row["bytes"], accuracy=row["accuracy"])
            for row in table.rows
            if not row["model"].startswith("one-shot")
        ]
    )
    page = report.page(
        config.out / "report.html",
        [report.Section(title="Result", parts=(rows, tradeoff))],
        title="A pretrained ResNet-20, compressed",
        summary="Intervals are 95 % paired bootstrap intervals of the difference to the dense "
        "network on the same images.",
    )
    print(f"\n{rows}\n\nReport: {page}")


if __name__ == "__main__":
    main(tyro.cli(Config))
