"""Quantize pretrained networks without training: two CIFAR ResNets and a character LSTM.

    python examples/quantize_pretrained.py            # all tables
    python examples/quantize_pretrained.py --quick    # a few formats each, two minutes

Reads `cifar10.npz`, `resnet20_cifar10.safetensors`, `resnet32_cifar10.safetensors`,
`charrnn_shakespeare.safetensors` with its vocabulary, and `tinyshakespeare.txt` from
`$JAXCOMPRESS_DATA`, by default `../shared/data` from the project's root.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from cifar import augmented, data_folder, load_network, normalise
from shakespeare import WARM, counted, load_model, read_text, spread
from side_by_side import SideBySide, remarks

from jaxcompress import quantize, report
from jaxcompress.numerics import MSE, AbsMax, Format, PerChannel, Range, int4
from jaxcompress.quantize import GPTQ, ClipSearch, Method, Policy, RoundToNearest, Rule, presets


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run.

    Attributes:
        quick: A few formats and calibration examples, to see that everything works.
        images: Augmented training images that methods and ranges see.
        windows: Windows of 256 characters of the training text that methods see.
        seed: Seeds the augmentation and the bootstrap.
        out: Where to write the packed files and the report.
        data: The folder with the data sets and the pretrained networks.
    """

    quick: bool = False
    images: int = 1000
    windows: int = 128
    seed: int = 0
    out: pathlib.Path = pathlib.Path("quantize-pretrained")
    data: pathlib.Path = field(default_factory=data_folder)


@dataclass(frozen=True, kw_only=True)
class Images:
    """CIFAR-10 as the networks take it.

    Attributes:
        seen: Batches of augmented training images: what methods and ranges see.
        batches: Batches of test images.
        labels: Their classes.
    """

    seen: list[jax.Array]
    batches: list[jax.Array]
    labels: np.ndarray


def read_images(config: Config) -> Images:
    arrays = np.load(config.data / "cifar10.npz")
    seen = augmented(arrays["x_train"][: config.images], seed=config.seed)
    batches = [normalise(jnp.asarray(part)) for part in np.split(arrays["x_test"], 2)]
    return Images(seen=seen, batches=batches, labels=arrays["y_test"])


def weights_only(method: Method, range: Range, *, correct_bias: bool = False) -> Policy:
    """int4 weights, a scale per output."""
    format = Format(int4, PerChannel(), range=range)
    return Policy((Rule(weights=format, method=method, correct_bias=correct_bias),))


INT4 = {
    "int4 RTN": weights_only(RoundToNearest(), AbsMax()),
    "int4 clip": weights_only(ClipSearch(), MSE()),
    "int4 GPTQ": weights_only(GPTQ(), MSE()),
}
POLICIES = {
    "int8 static": presets.int8_static,
    "int8": presets.int8,
    "int8 weights": presets.int8_weights,
    "float8": presets.float8,
    "mxfp8": presets.mxfp8,
    "mxfp4": presets.mxfp4,
    "nvfp4": presets.nvfp4,
    "nf4 g64": presets.nf4,
    **INT4,
    "int4 GPTQ, bias corrected": weights_only(GPTQ(), MSE(), correct_bias=True),
    "int4 GPTQ, whole range": weights_only(GPTQ(), AbsMax()),
}
QUICK = ("int8 static", "int4 RTN", "int4 GPTQ")


def quantize_all(
    table: SideBySide,
    fn: Callable[..., Any],
    params: Any,
    seen: Sequence[Any],
    policies: Mapping[str, Policy],
    *,
    read: Callable[[Any], Any] = lambda fn: fn,
) -> None:
    """Add a row for each policy.

    Args:
        table: Where to.
        fn: `(params, batch) -> outputs`.
        params: Its params.
        seen: Batches of calibration examples.
        policies: By name.
        read: From fn to `(params, batch) -> logits (examples, classes)`.
    """
    for name, policy in policies.items():
        result = quantize.ptq(fn, params, seen, policy)
        table.add(name, result.params, fn=read(fn), note=remarks(result))


def resnet(depth: int, images: Images, config: Config) -> report.Table:
    """Quantize a ResNet, its BatchNorm folded into the convolutions before it."""
    network = load_network(config.data, depth=depth)
    fn, params = network.forward, network.params
    table = SideBySide(
        fn=fn,
        batches=images.batches,
        labels=images.labels,
        folder=config.out / f"resnet{depth}",
        seed=config.seed,
    )
    table.add("float32", params)
    folded, params = quantize.fold_norm(fn, params, images.batches[0])
    table.add("float32, BatchNorm folded", params, fn=folded)
    names = QUICK if config.quick else tuple(POLICIES)
    quantize_all(table, folded, params, images.seen, {name: POLICIES[name] for name in names})
    return table.table(f"ResNet-{depth}, {len(images.labels)} CIFAR-10 test images")


def lstm(config: Config) -> report.Table:
    """Quantize the character model, recurrent kernels and embedding too."""
    ids, windows = read_text(config.data, windows=16 if config.quick else 64)
    fn, params = load_model(config.data)
    table = SideBySide(
        fn=counted(fn),
        batches=np.split(windows[:, :-1], len(windows) // 16),
        labels=windows[:, 1 + WARM :].ravel(),
        folder=config.out / "lstm",
        bits=True,
        seed=config.seed,
    )
    table.add("float32", params)
    seen = spread(ids, config.windows)[:, :-1]
    policies = {name: POLICIES[name] for name in (QUICK if config.quick else LSTM)}
    quantize_all(table, fn, params, np.split(seen, len(seen) // 16), policies, read=counted)
    return table.table(f"Character LSTM, {len(table.labels):,} held-out characters")


LSTM = ("int8 static", "int8", "int8 weights", *INT4)


def main(config: Config) -> None:
    if config.quick:
        config = replace(config, images=250, windows=16)
    images = read_images(config)
    depths = (20,) if config.quick else (20, 32)
    tables = [*(resnet(depth, images, config) for depth in depths), lstm(config)]
    for number, table in enumerate(tables):
        table.to_json(config.out / f"results{number}.json")
    page = report.page(
        config.out / "report.html",
        [report.Section(title=table.title, parts=(replace(table, title=""),)) for table in tables],
        title="Pretrained networks, quantized without training",
        summary="Intervals are 95 % paired bootstrap intervals of the difference to float32 on "
        "the same examples; cross-entropy in nats, or bits per character.",
    )
    for table in tables:
        print(f"\n{table.text(width=120)}")
    print(f"\nReport: {page}")


if __name__ == "__main__":
    main(tyro.cli(Config))
