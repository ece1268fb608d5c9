"""Shrink a pretrained CIFAR-10 ResNet to 2.1 times fewer multiply-adds, and distil it.

    python examples/shrink_resnet.py                       # ResNet-20, a quarter of an hour
    python examples/shrink_resnet.py --network resnet32
    python examples/shrink_resnet.py --drop 3 --round-to 8 # whole blocks first: faster on a CPU
    python examples/shrink_resnet.py --jpeg                # more images, without labels, too
    python examples/shrink_resnet.py --quick               # a few steps each, two minutes

Channels that are missed least go, inside of blocks and from the residual stream, and before them,
if asked, the residual blocks that change the stream least; BatchNorm is re-estimated; what is left
learns to answer as the dense network does, on 4,000 training images, augmented. Each stage is
compared with the dense network on the same test images.

Reads `cifar10.npz`, `cifar10_jpeg.npz` and the pretrained networks from `$JAXCOMPRESS_DATA`, by
default `../shared/data` from the project's root.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from cifar import Network, augmented, data_folder, distil, load_network, normalise
from side_by_side import SideBySide, certified

from jaxcompress import graph, report, structured, train

DROPPED, KEEP = "dropped.json", "keep.json"  # what is served is made from these, and params


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        network: Which of the pretrained networks.
        quick: A few steps, to see that everything works.
        ratio: How many times fewer multiply-adds.
        drop: How many residual blocks to drop first. What is left keeps more of its channels, and
            a CPU gains all of it, where convolutions of few channels are slow.
        round_to: Numbers of channels to keep are multiples of it.
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
    drop: int = 0
    round_to: int = 1
    residual: float = 0.8
    jpeg: bool = False
    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 0.02
    seed: int = 0
    out: pathlib.Path = pathlib.Path("shrink-resnet")
    data: pathlib.Path = field(default_factory=data_folder)


def drop_blocks(
    network: Network, seen: Sequence[jax.Array], config: Config
) -> tuple[Network, structured.Certificate]:
    """Drop the residual blocks that turn the stream least."""
    fn, params, images = network.forward, network.params, seen[0][:64]
    influence = structured.block_influence(fn, params, seen, level="block")
    names = structured.choose_layers(fn, params, influence, images, budget=config.drop)
    smaller, fewer, certificate = structured.drop_layers(fn, params, names, images)
    smaller.dropped.save(config.out / DROPPED)
    smaller_train = structured.rebuild_layers(network.forward_train, smaller.dropped, params)
    print(f"without {', '.join(names)}\n{certificate}")
    return Network(params=fewer, forward=smaller, forward_train=smaller_train), certificate


def choose(network: Network, images: jax.Array, flops: int, config: Config) -> structured.Keep:
    """Keep the channels that others could stand for least, comparing those of one kind."""
    groups = structured.groups(network.forward, network.params, images, round_to=config.round_to)
    keep = structured.choose(
        groups,
        structured.importance(groups, network.params, method=structured.FPGM()),
        budget=structured.Flops(flops),
        scope="isomorphic",
        bounds={"residual": (config.residual, 1.0)},
    )
    for name, group in groups.items():
        left = len(keep[name]) if name in keep else group.size
        print(f"{left:4} of {group.size:3} {group.description}")
    return keep


def served(network: Network, config: Config) -> Callable[..., jax.Array]:
    """Make what is served from the files: fn again without what went; arrays are smaller."""
    fn = network.forward
    if config.drop:
        dropped = structured.Dropped.load(config.out / DROPPED)
        fn = structured.rebuild_layers(fn, dropped, network.params)
    return structured.rebuild(fn, structured.Keep.load(config.out / KEEP))


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

    seen = augmented(pixels[: 250 if config.quick else 1000], seed=config.seed)
    images = seen[0][:64]
    flops = int(graph.trace(network.forward, network.params, images).flops / config.ratio)
    student, sections = network, []
    if config.drop:
        student, certificate = drop_blocks(network, seen, config)
        sections.append(certified(certificate, "Certificate of dropping blocks"))
        table.add("without blocks", student.params, fn=student.forward)
    keep = choose(student, images, flops, config)
    small, params, certificate = structured.shrink(student.forward, student.params, keep, images)
    sections.append(certified(certificate, "Certificate of shrinking"))
    keep.save(config.out / KEEP)
    print(certificate)
    table.add("shrunk", params, fn=small)

    small_train = structured.rebuild(student.forward_train, keep)
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
    table.add("shrunk, distilled", state.params, fn=served(network, config))

    rows = table.table(f"{config.network}, {len(table.labels)} CIFAR-10 test images")
    rows.to_json(config.out / "results.json")
    page = report.page(
        config.out / "report.html",
        [report.Section(title="Result", parts=(replace(rows, title=""),)), *sections],
        title=f"A pretrained {config.network}, with {config.ratio} times fewer multiply-adds",
        summary="Intervals are 95 % paired bootstrap intervals of the difference in cross-entropy "
        "to the dense network on the same images.",
    )
    print(f"\n{rows.text(width=120)}\n\nReport: {page}")


if __name__ == "__main__":
    main(tyro.cli(Config))
