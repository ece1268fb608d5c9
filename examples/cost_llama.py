"""What Llama-style models cost on accelerators that are not attached, before any weight exists.

    pip install 'jaxcompress[tpu]'        # and 'jaxcompress[cuda12]' for the h200
    python examples/cost_llama.py         # 1B and 8B shapes on v5e, v6e, v5p and h200
    python examples/cost_llama.py --phases decode prefill --json cost.json
    python examples/cost_llama.py --models 1b --targets tpu-v5e

Compiles a decoding step (one token for each of 8 sequences, against a cache) and a prefill (512
tokens of one sequence) ahead of time, with weights in bfloat16, int8 (a scale per output) and int4
(a scale per output and 128 inputs), stored as `quantize.pack` stores them. All arrays are abstract:
8B parameters take no memory. Times are the TPU compiler's estimates, or, where it gives none and
for CUDA, rooflines; none is a measurement. CUDA's compiler counts nothing, so that its roofline is
over what must move at least: arguments, results, and weights that the program expands. The
embedding and the head stay in bfloat16. The matmul below keeps groups apart; `quantize.unpack` is
shown beside it.
"""

import concurrent.futures
import json
import os
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro
from models.llama import LLAMA_1B, LLAMA_8B, LlamaConfig

from jaxcompress import graph, quantize
from jaxcompress.errors import MissingExtraError
from jaxcompress.numerics import Format, PerChannel, PerGroup, QArray, int4, int8

MODELS = {"1b": LLAMA_1B, "8b": LLAMA_8B}
# Layers are stacked: each has scales of its own.
FORMATS = {
    "bf16": None,
    "int8": Format(int8, PerChannel((0, -1)), scale_dtype=jnp.bfloat16),
    "int4 g128": Format(int4, PerGroup(128), scale_dtype=jnp.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to cost.

    Attributes:
        models: `1b` (Llama 3.2 1B shapes) and `8b` (Llama 3 8B shapes).
        phases: `decode` and `prefill`; prefill takes the TPU compiler half a minute each.
        targets: Names that `graph.Target.named` knows.
        batch: Sequences of the decoding step.
        context: Length of the cache that it reads.
        prompt: Tokens of the prefill.
        json: A file for all figures, with their origins.
    """

    models: tuple[Literal["1b", "8b"], ...] = ("1b", "8b")
    phases: tuple[Literal["decode", "prefill"], ...] = ("decode",)
    targets: tuple[str, ...] = ("tpu-v5e", "tpu-v6e", "tpu-v5p", "h200")
    batch: int = 8
    context: int = 1024
    prompt: int = 512
    json: pathlib.Path | None = None


def shapes(c: LlamaConfig) -> dict[str, Any]:
    """Give the params as abstract arrays, layers stacked."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    layer = partial(array, c.layers)
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    params = {
        "embed": array(c.vocab, c.dim),
        "layers": {
            "norm1": layer(c.dim),
            "q": layer(c.dim, heads),
            "k": layer(c.dim, kv_heads),
            "v": layer(c.dim, kv_heads),
            "o": layer(heads, c.dim),
            "norm2": layer(c.dim),
            "gate": layer(c.dim, c.hidden),
            "up": layer(c.dim, c.hidden),
            "down": layer(c.hidden, c.dim),
        },
        "norm": array(c.dim),
    }
    return params if c.tied else {**params, "head": array(c.vocab, c.dim)}


def packed(params: dict[str, Any], format: Format | None) -> dict[str, Any]:
    """Store the layers' matrices in a format, still abstract."""
    if format is None:
        return params
    where = [f"layers/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    policy = quantize.Policy((quantize.Rule(where=where, weights=format),))
    return jax.eval_shape(partial(quantize.pack, policy=policy, strict=True), params)


def dense(x: jax.Array, w: Any) -> jax.Array:
    """Multiply by one layer's weight, dequantized on the way into the matmul.

    `quantize.unpack` would write all weights to memory first. This is the form that XLA fuses:
    groups are contracted beside the entries in them, never merged after scaling.
    """
    if not isinstance(w, QArray):
        return x @ w
    values, scale = w.values.astype(x.dtype), w.scale.astype(x.dtype)
    if values.ndim == 2:
        return (x @ values) * scale
    # (..., in) -> (..., groups, size)
    return jnp.einsum(
        "...gk,gkn->...n", x.reshape(*x.shape[:-1], *values.shape[:2]), values * scale
    )


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # (time, 1, head / 2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attend from q (b, t, kv heads, queries, d) to the cache (b, s, kv heads, d)."""
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[1]) <= positions[:, None]  # (t, s)
    scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v)


def step(
    c: LlamaConfig, params: Any, tokens: jax.Array, cache: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Read tokens (batch, time) at a position: next-token logits, and the cache with them in it.

    The cache is (layers, 2, batch, context, kv heads, head): keys and values.
    """
    batch, length = tokens.shape
    positions = position + jnp.arange(length)
    split = lambda y: y.reshape(batch, length, -1, c.head_dim)  # (b, t, heads, d)

    def block(carry: Any, layer: Any) -> Any:
        x, cache = carry
        index, w = layer
        y = rms_norm(x, w["norm1"])
        q, k = (rope(split(dense(y, w[name])), positions, c.theta) for name in "qk")
        new = jnp.stack([k, split(dense(y, w["v"]))])[None]
        cache = jax.lax.dynamic_update_slice(cache, new, (index, 0, 0, position, 0, 0))
        k, v = jax.lax.dynamic_index_in_dim(cache, index, keepdims=False)
        q = q.reshape(batch, length, c.kv_heads, -1, c.head_dim)
        x = x + dense(attention(q, k, v, positions).reshape(batch, length, -1), w["o"])
        y = rms_norm(x, w["norm2"])
        x = x + dense(jax.nn.silu(dense(y, w["gate"])) * dense(y, w["up"]), w["down"])
        return (x, cache), None

    layers = (jnp.arange(c.layers), params["layers"])
    (x, cache), _ = jax.lax.scan(block, (params["embed"][tokens], cache), layers)
    head = params["embed"] if c.tied else params["head"]
    return rms_norm(x[:, -1], params["norm"]) @ head.T, cache


def unpacked_step(c: LlamaConfig, params: Any, *inputs: jax.Array) -> Any:
    """Do the same after `quantize.unpack`: every weight is written out in bfloat16 first."""
    return step(c, quantize.unpack(params), *inputs)


def inputs(c: LlamaConfig, batch: int, length: int, context: int) -> tuple[Any, ...]:
    cache = (c.layers, 2, batch, context, c.kv_heads, c.head_dim)
    return (
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct(cache, jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def cases(config: Config) -> Iterator[tuple[str, str, str, Any, Any, tuple[Any, ...]]]:
    """Yield model, phase, format, fn, params and inputs."""
    for model in config.models:
        c = MODELS[model]
        phases = {
            "decode": inputs(c, config.batch, 1, config.context),
            "prefill": inputs(c, 1, config.prompt, config.prompt),
        }
        for phase in config.phases:
            given = phases[phase]
            for name, format in FORMATS.items():
                params = packed(shapes(c), format)
                yield model, phase, name, partial(step, c), params, given
            if phase == "decode":
                yield model, phase, "int4 unpacked", partial(unpacked_step, c), params, given


def installed(names: tuple[str, ...], console: rich.console.Console) -> list[graph.Target]:
    """Drop the targets whose compiler is not there, and say so."""
    targets = []
    for target in map(graph.Target.named, names):
        try:
            target.devices()
            targets.append(target)
        except MissingExtraError as error:
            console.print(f"Without {target.name}: {error}", markup=False)
    return targets


def one(case: Any) -> dict[str, Any]:
    """Cost one program."""
    (model, phase, weights, fn, params, given), target = case
    begun = time.perf_counter()
    found = graph.cost(fn, params, *given, target=target, donate=(1,))
    labels = {"model": model, "phase": phase, "weights": weights, "target": target.name}
    return {**labels, "cost_seconds": time.perf_counter() - begun, "cost": found}


def row(record: dict[str, Any]) -> list[str]:
    found = record["cost"]
    compiled = found.compiled
    gib = lambda figure: "–" if figure is None else f"{figure.value / 2**30:.2f}"
    seconds = compiled.seconds
    return [
        *(record[key] for key in ("model", "phase", "weights", "target")),
        f"{found.param_bytes / 2**30:.2f}",
        gib(compiled.memory.temporaries),
        gib(compiled.memory.peak),
        {True: "yes", False: "NO", None: "?"}[compiled.fits],
        gib(compiled.bytes),
        "–" if seconds is None else f"{1e3 * seconds.value:.2f}",
        "" if seconds is None else seconds.origin,
        " ".join(path.removeprefix("layers/") for path in compiled.expanded),
    ]


def main(config: Config) -> None:
    console, start = rich.console.Console(), time.perf_counter()
    console = rich.console.Console(width=max(console.width, 140))
    targets = installed(config.targets, console)
    table = rich.table.Table(title="One call on one device; sizes in GiB, time in ms")
    for title in ["model", "phase", "weights", "target"]:
        table.add_column(title, no_wrap=True)
    for title in ["params", "temporaries", "peak", "fits", "moved", "time"]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("whose time", no_wrap=True)
    table.add_column("expanded")
    records: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [(case, target) for case in cases(config) for target in targets]
        for record in pool.map(one, work):
            console.print("  ".join(row(record)), style="dim", highlight=False)
            if records and records[-1]["phase"] != record["phase"]:
                table.add_section()
            table.add_row(*row(record))
            records.append(record)
    console.print(table)
    console.print(
        "expanded: weights that the program writes to memory in floating point before multiplying."
        f" {len(records)} programs in {time.perf_counter() - start:.0f} s."
    )
    if config.json is not None:
        plain = [{**record, "cost": record["cost"].as_dict()} for record in records]
        config.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
