"""What does a graph cost over `jax.make_jaxpr`, and a replayed function over the original?

A plain-JAX transformer (rotary positions, gated MLP) of 2 to 64 unrolled layers, and scanned. For
each: `make_jaxpr` alone against `graph.summary` (which traces and walks); and the original against
`graph.replay` with an identity handler at every site: lowering, compiling and running under `jit`.
In turns, each time with a new function, since JAX keeps what it traced; tracing and compiling in
processor time, running by the clock; ratios are medians over turns. To reach: growth linear,
summary at most 5 times `make_jaxpr`, run time of the replay the original's, its lowering and
compiling together at most 1.2 times.
"""

import argparse
import gc
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import graph

TOKENS, DIM, HEADS, HIDDEN, VOCAB = 32, 64, 4, 128, 96


def shapes(layers: int, *, scanned: bool) -> dict[str, Any]:
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    layer = {
        **{name: struct(DIM, HEADS, DIM // HEADS) for name in ("q", "k", "v")},
        "o": struct(HEADS, DIM // HEADS, DIM),
        "gate": struct(DIM, HIDDEN),
        "up": struct(DIM, HIDDEN),
        "down": struct(HIDDEN, DIM),
        "norm1": struct(DIM),
        "norm2": struct(DIM),
    }
    params = {"embed": struct(VOCAB, DIM), "head": struct(DIM, VOCAB), "norm": struct(DIM)}
    if scanned:
        stack = lambda s: jax.ShapeDtypeStruct((layers, *s.shape), s.dtype)
        return {**params, "layers": jax.tree.map(stack, layer)}
    return {**params, **{f"layer_{k}": layer for k in range(layers)}}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[0])[:, None] * 0.01 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # (tokens, 1, half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = norm(x, p["norm1"])
    q, k, v = (jnp.einsum("td,dhe->the", y, p[name]) for name in ("q", "k", "v"))
    scores = jnp.einsum("the,she->hts", rotate(q), rotate(k)) / math.sqrt(q.shape[-1])
    visible = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e9), axis=-1)
    x = x + jnp.einsum("the,hed->td", jnp.einsum("hts,she->the", weights, v), p["o"])
    y = norm(x, p["norm2"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def model(layers: int, *, scanned: bool) -> Callable[..., jax.Array]:
    """A new function each time: JAX keeps what it traced by identity."""

    def fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])
        else:
            for k in range(layers):
                x = block(params[f"layer_{k}"], x)
        return norm(x, params["norm"]) @ params["head"]

    return fn


def cpu_seconds(run: Callable[[], Any]) -> float:
    """The processor time of this process, which others on the machine do not disturb."""
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def wall_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], float]], *, repeats: int) -> dict[str, list[float]]:
    """Time in turns; milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(1e3 * run())
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def tracing(layers: int, *, scanned: bool, repeats: int) -> dict[str, list[float]]:
    params, tokens = shapes(layers, scanned=scanned), jax.ShapeDtypeStruct((TOKENS,), jnp.int32)

    def fresh(run: Callable[..., Any]) -> Callable[[], float]:
        def once() -> float:
            fn = model(layers, scanned=scanned)
            return cpu_seconds(lambda: run(fn))

        return once

    runs = {
        "make_jaxpr": fresh(lambda fn: jax.make_jaxpr(fn)(params, tokens)),
        "trace": fresh(lambda fn: graph.trace(fn, params, tokens)),
        "summary": fresh(lambda fn: graph.summary(fn, params, tokens)),
    }
    return in_turns(runs, repeats=repeats)


def identity(equation: graph.Equation, *operands: Any) -> Any:
    return equation.bind(*operands)


def replaying(layers: int, *, scanned: bool, repeats: int) -> dict[str, list[float]]:
    like = shapes(layers, scanned=scanned)
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, s: 0.1 * jax.random.normal(key, s.shape)
    params = jax.tree.unflatten(structure, [draw(k, s) for k, s in zip(keys, leaves, strict=True)])
    tokens = jnp.arange(TOKENS) % VOCAB
    make = {
        "original": lambda: model(layers, scanned=scanned),
        "replayed": lambda: graph.replay(model(layers, scanned=scanned), {"**": identity}),
    }
    compiled: dict[str, Any] = {}

    def compile_anew(name: str) -> float:
        fn = jax.jit(make[name]())

        def work() -> None:
            compiled[name] = fn.lower(params, tokens).compile()

        return cpu_seconds(work)

    builds = {f"compile_{n}": lambda n=n: compile_anew(n) for n in make}
    times = in_turns(builds, repeats=repeats)
    results = [run(params, tokens) for run in compiled.values()]  # warm up
    assert jnp.array_equal(*results)
    runs = {
        f"run_{n}": lambda f=f: wall_seconds(lambda: f(params, tokens)) for n, f in compiled.items()
    }
    return times | in_turns(runs, repeats=20 * repeats)


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {"summary_over_make_jaxpr": ratio(times, "summary", "make_jaxpr")}
    for stage in ("compile", "run"):
        if f"{stage}_replayed" in times:
            name = f"{stage}_replayed_over_original"
            ratios[name] = ratio(times, f"{stage}_replayed", f"{stage}_original")
    return {"ms": {name: statistics.median(several) for name, several in times.items()}, **ratios}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(float(value), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--replayed", type=int, nargs="*", default=[2, 8, 32], help="depths to jit")
    arguments = parser.parse_args()

    cases = [(n, False) for n in arguments.layers] + [(max(arguments.layers), True)]
    tracing(2, scanned=False, repeats=1)  # warm up
    found = {}
    for layers, scanned in cases:
        times = tracing(layers, scanned=scanned, repeats=arguments.repeats)
        if layers in arguments.replayed or (scanned and arguments.replayed):
            times |= replaying(layers, scanned=scanned, repeats=arguments.repeats)
        found[f"{layers} scanned" if scanned else f"{layers} unrolled"] = figures(times)
    growth = {  # milliseconds ~ layers**growth
        name: np.polyfit(
            np.log(arguments.layers),
            np.log([found[f"{n} unrolled"]["ms"][name] for n in arguments.layers]),
            1,
        )[0]
        for name in ("make_jaxpr", "summary")
    }
    targets = {
        "summary_over_make_jaxpr": 5,
        "compile_replayed_over_original": 1.2,
        "run_replayed_over_original": 1,
        "growth": 1,
    }
    result = {"layers": rounded(found), "growth": rounded(growth), "targets": targets}
    result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **result}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
