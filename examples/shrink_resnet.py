"""Shrink a pretrained CIFAR-10 ResNet to 2.1 times fewer multiply-adds, and distil it.

    python examples/shrink_resnet.py                       # ResNet-20, a quarter of an hour
    python examples/shrink_resnet.py --network resnet32
    python examples/shrink_resnet.py --jpeg                # more images, without labels, too
    python examples/shrink_resnet.py --quick               # a few steps each, two minutes

Channels that are missed least go, inside of blocks and from the residual stream; BatchNorm is
re-estimated; what is left learns to answer as the dense network does, on 4,000 training images,
augmented. Each stage is compared with the dense network on the same test images.

Reads `cifar10.npz`, `cifar10_jpeg.npz` and the pretrained networks from `$JAXCOMPRESS_DATA`, by
default `../shared/data` from the project's root.
"""

import pathlib
from dataclasses import dataclass, field, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro
from cifar import Network, augmented, data_folder, distil, load_network, normalise
from side_by_side import SideBySide, certified

from jaxcompress import report, structured, train


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        network: Which of the pretrained networks.
        quick: A few steps, to see that everything works.
        ratio: How many times fewer multiply-adds.
        residual: The least of the residual stream's channels to keep, as a fraction: it is read
            and written everywhere, and harder to recover than what is inside of a block.
        jpeg: Distil on the JPEG images too, another domain; no labels are read.
        epochs: Passes over the 4,000 training images, whose number of steps is kept with `jpeg`.
        batch_size: Images per step.
        learning_rate: The first; it falls to 0 by a cosine.
        seed: Seeds the order of the images, their augmentation and the bootstrap.
        out: Where to write the files and the report.
        data: The folder with the data sets and the pretrained networks.
    """

    network: Literal["resnet20", "resnet32"] = "resnet20"
    quick: bool = False
    ratio: float = 2.1
    residual: float = 0.8
    jpeg: bool = False
    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 0.02
    seed: int = 0
    out: pathlib.Path = pathlib.Path("shrink-resnet")
    data: pathlib.Path = field(default_factory=data_folder)


def choose(network: Network, images: jnp.ndarray, config: Config) -> structured.Keep:
    """Keep the channels that others could stand for least, comparing those of one kind."""
    groups = structured.groups(network.forward, network.params, images)
    keep = structured.choose(
        groups,
        structured.importance(groups, network.params, method=structured.FPGM()),
        budget=structured.Flops(1 / config.ratio),
        scope="isomorphic",
        bounds={"residual": (config.residual, 1.0)},
    )
    for name, group in groups.items():
        left = len(keep[name]) if name in keep else group.size
        print(f"{left:4} of {group.size:3} {group.description}")
    return keep


def main(config: Config) -> None:
    arrays = np.load(config.data / "cifar10.npz")
    pixels = arrays["x_train"]
    network = load_network(config.data, depth=int(config.network.removeprefix("resnet")))
    table = SideBySide(
        fn=network.forward,
        batches=[normalise(jnp.asarray(part)) for part in np.split(arrays["x_test"], 2)],
        labels=arrays["y_test"],
        folder=config.out,
        repeats=15,
        seed=config.seed,
    )
    table.add("dense", network.params)

    images = table.batches[0][:64]
    keep = choose(network, images, config)
    small, params, certificate = structured.shrink(network.forward, network.params, keep, images)
    print(certificate)
    table.add("shrunk", params, fn=small)

    small_train = structured.rebuild(network.forward_train, keep)
    seen = augmented(pixels[: 250 if config.quick else 1000], seed=config.seed)
    params = structured.reestimate(small_train, params, seen)
    table.add("shrunk, re-estimated", params, fn=small)

    if config.jpeg:
        pixels = np.concatenate([pixels, np.load(config.data / "cifar10_jpeg.npz")["x_train"]])
    data = train.Batches({"pixels": pixels}, batch_size=config.batch_size, seed=config.seed)
    state = distil(
        network,
        small_train,
        params,
        data,
        steps=5 if config.quick else config.epochs * len(arrays["x_train"]) // config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    keep.save(config.out / "keep.json")
    # The files are enough: what is served is fn again with what was kept, and smaller arrays.
    again = structured.rebuild(network.forward, structured.Keep.load(config.out / "keep.json"))
    table.add("shrunk, distilled", state.params, fn=again)

    rows = table.table(f"{config.network}, {len(table.labels)} CIFAR-10 test images")
    rows.to_json(config.out / "results.json")
    page = report.page(
        config.out / "report.html",
        [
            report.Section(title="Result", parts=(replace(rows, title=""),)),
            certified(certificate),
        ],
        title=f"A pretrained {config.network}, with {config.ratio} times fewer multiply-adds",
        summary="Intervals are 95 % paired bootstrap intervals of the difference in cross-entropy "
        "to the dense network on the same images.",
    )
    print(f"\n{rows.text(width=120)}\n\nReport: {page}")


if __name__ == "__main__":
    main(tyro.cli(Config))
