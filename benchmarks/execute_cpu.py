"""How fast do quantized programs run on this CPU, next to float32, Qwix and torchao?

    pip install qwix torchao torch          # each is left out where it is not installed
    python benchmarks/execute_cpu.py [--batch 512] [--repeats 9] [--json PATH]

An MLP of 8 layers, 1024 and 4096 wide in turn: float32, bfloat16, int8 weights and activations
(per token, dynamic), int4 weights in groups of 128 with int8 activations. CIFAR ResNet-20s of base
width 16, 32 and 64, batch 64: float32, and static int8 with BatchNorm folded. Medians over
interleaved repeats; `times_float32` is float32's median over the contender's. What a CPU can win
depends on its integer units: the report says which it has.
"""

import argparse
import importlib.util
import json
import pathlib
import platform
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from models.resnet import CifarResNet

from jaxcompress import adapters, quantize
from jaxcompress.numerics import Format, PerGroup, PerToken, int4, int8
from jaxcompress.quantize import presets

WIDTHS = (4096, 1024) * 4
INT4_INT8 = quantize.Policy(
    (
        quantize.Rule(
            weights=Format(int4, PerGroup(128), scale_dtype=jnp.bfloat16),
            activations=Format(int8, PerToken()),
        ),
    )
)


class Mlp(nn.Module):
    """8 dense layers without biases, ReLU between."""

    @nn.compact
    def __call__(self, x):
        """Run the layers."""
        for i, width in enumerate(WIDTHS):
            x = nn.Dense(width, use_bias=False, name=f"layer_{i}")(x)
            x = nn.relu(x) if i < len(WIDTHS) - 1 else x
        return x


def mlp_contenders(batch: int):
    """Build `{name: function of nothing}` for the MLP."""
    module, x = Mlp(), jax.random.normal(jax.random.key(0), (batch, 1024))
    fn, params = adapters.from_linen(module, module.init(jax.random.key(1), x))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    quantized = {
        name: quantize.ptq(fn, params, [x], policy).params
        for name, policy in (("int8 x int8", presets.int8), ("int4 g128 x int8", INT4_INT8))
    }
    calls = {
        "float32": _jitted(fn, params, x),
        "bfloat16": _jitted(fn, half, x.astype(jnp.bfloat16)),
    }
    execute = quantize.execute(fn)
    calls |= {name: _jitted(execute, q, x) for name, q in quantized.items()}
    return calls | _qwix(module, params, x) | _torchao(batch)


def resnet_contenders(width: int):
    """Build `{name: function of nothing}` for a ResNet-20."""
    module, x = CifarResNet(blocks=3, width=width), jnp.ones((64, 32, 32, 3))
    x = jax.random.normal(jax.random.key(0), x.shape)
    fn, params = adapters.from_linen(module, module.init(jax.random.key(1), x), train=False)
    folded, folded_params = quantize.fold_norm(fn, params, x)
    static = quantize.ptq(folded, folded_params, [x], presets.int8_static).params
    return {
        "float32": _jitted(fn, params, x),
        "int8 static": _jitted(quantize.execute(folded), static, x),
    }


def _jitted(fn, *args):
    compiled = jax.jit(fn)
    return lambda: jax.block_until_ready(compiled(*args))


def _qwix(module, params, x):
    if importlib.util.find_spec("qwix") is None:
        return {}
    import qwix

    calls = {}
    for name, options in (
        ("qwix int8 x int8", {"weight_qtype": "int8"}),
        ("qwix int4 g128 x int8", {"weight_qtype": "int4", "tile_size": 128}),
    ):
        rule = qwix.QuantizationRule(act_qtype="int8", **options)
        model = qwix.quantize_model(module, qwix.PtqProvider([rule]))
        abstract = jax.eval_shape(model.init, jax.random.key(1), x)["params"]
        q = qwix.quantize_params(params["params"], abstract)
        calls[name] = _jitted(model.apply, {"params": q}, x)
    return calls


def _torchao(batch: int):
    if importlib.util.find_spec("torchao") is None:
        return {}
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def build():
        layers, width = [], 1024
        for i, out in enumerate(WIDTHS):
            layers += [torch.nn.Linear(width, out, bias=False)]
            layers += [torch.nn.ReLU()] if i < len(WIDTHS) - 1 else []
            width = out
        return torch.nn.Sequential(*layers).eval()

    x, dense, q = torch.randn(batch, 1024), build(), build()
    quantize_(q, Int8DynamicActivationInt8WeightConfig())

    def call(model):
        def run():
            with torch.inference_mode():
                model(x)

        return run

    return {"torch float32": call(dense), "torchao int8 dynamic": call(q)}


def measure(contenders, repeats: int):
    """Time each contender `repeats` times, taking turns, after two warm-up calls each."""
    for call in contenders.values():
        call(), call()
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "ms": round(1e3 * median, 2),
            "best_ms": round(1e3 * min(seconds[name]), 2),
            "times_float32": round(medians["float32"] / median, 2),
        }
        for name, median in medians.items()
    }


def integer_units() -> list[str]:
    """List the CPU's integer dot-product extensions."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    known = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
    return [name for name in known if name in flags]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    report = {
        "jax": jax.__version__,
        "machine": platform.machine(),
        "integer_units": integer_units(),
        "mlp": measure(mlp_contenders(args.batch), args.repeats),
        "resnet20": {w: measure(resnet_contenders(w), args.repeats) for w in (16, 32, 64)},
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
