"""What do second-moment statistics cost, next to the forward passes they ride on?

`stats.collect` of XᵀX at every site of a Llama-style model (examples/models/llama.py, layers
scanned with rematerialisation, untied head) over 64 batches. The peer, timed in turns in the same
run, is what cannot be saved: the 64 forward passes, and one XᵀX product for each distinct
activation (query, key and value share one; so do gate and up) of each layer, as bare jitted
matrix products of the same shapes and precision. To reach: at most 1.5 times their sum. Compiling
is not timed: clocks start after a few batches. Collected need no logits, so that the compiler
drops the head's product from the collecting pass; the peer computes it.

`stats.sequential` does the same site by site, with a visitor that changes nothing. It compiles as
it goes: its time is that of a run over all batches, less that of one over the few. To reach: at
most twice the same sum.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import graph, stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from models.llama import Llama, LlamaConfig

WARM_UP = 4


def problem(arguments):
    """Build `(fn, params, batches)`, the first of which warm up."""
    config = LlamaConfig(
        vocab=512,
        dim=arguments.dim,
        layers=4,
        heads=arguments.dim // 32,
        kv_heads=arguments.dim // 64,
        head_dim=32,
        hidden=arguments.dim * 11 // 4,
    )
    model = Llama(config)
    draw = np.random.default_rng(0)
    shape = (arguments.batch_size, arguments.length)
    batches = [
        draw.integers(0, config.vocab, shape, dtype=np.int32)
        for _ in range(WARM_UP + arguments.batches)
    ]
    params = model.init(jax.random.key(0), batches[0])
    return model.apply, params, batches


def clocked(batches, clock):
    """Give the batches, and note when the first after the warm-up and the end are asked for."""
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            clock.append(time.perf_counter())
        yield batch
    clock.append(time.perf_counter())


def time_collect(fn, params, batches, statistic):
    clock = []
    jax.block_until_ready(dict(stats.collect(fn, params, clocked(batches, clock), statistic)))
    return clock[1] - clock[0]


def time_sequential(fn, params, batches, statistic):
    def run(batches):
        start, results = time.perf_counter(), {}
        visit = lambda stop: results.update(
            {(stop.iteration, n): r for n, r in stop.results.items()}
        )
        stats.sequential(fn, params, batches, statistic, visit)
        jax.block_until_ready(results)
        return time.perf_counter() - start

    return run(batches) - run(batches[:WARM_UP])


def time_streamed(run, batches):
    """Time a jitted function over the batches, with as many in flight as `collect` has."""
    clock, pending = [], []
    for batch in clocked(batches, clock):
        pending.append(run(batch))
        if len(pending) > 2:
            jax.block_until_ready(pending.pop(0))
    jax.block_until_ready(pending)
    return clock[1] - clock[0]


def gram_shapes(fn, params, batch):
    """List `(tokens, features)` of each distinct activation, once per run of its sites."""
    traced = graph.trace(fn, params, batch)
    distinct = {site.source: site for site in traced.sites if site.axes.contract}
    shapes = []
    for site in distinct.values():
        rows = jax.eval_shape(site.rows, site.activation)
        shapes += [rows.shape] * int(np.prod(site.stack, dtype=int))
    return shapes


def measure(arguments):
    fn, params, batches = problem(arguments)
    shapes = gram_shapes(fn, params, batches[0])
    draw = np.random.default_rng(1)
    inputs = [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]
    forward = jax.jit(fn)
    grams = jax.jit(lambda xs: [jnp.matmul(x.T, x, precision="highest") for x in xs])
    runs = {
        "collect": lambda: time_collect(fn, params, batches, stats.second_moment()),
        "sequential": lambda: time_sequential(fn, params, batches, stats.second_moment()),
        "forward": lambda: time_streamed(lambda batch: forward(params, batch), batches),
        "grams": lambda: time_streamed(lambda _: grams(inputs), batches),
    }
    times = {name: [] for name in runs}
    for _ in range(arguments.repeats):  # in turns, so that all meet the same noise
        for name, run in runs.items():
            times[name].append(run())
    seconds = {name: statistics.median(ts) for name, ts in times.items()}
    flops = len(batches[WARM_UP:]) * sum(2 * tokens * width**2 for tokens, width in shapes)
    rounds = [dict(zip(times, ts, strict=True)) for ts in zip(*times.values(), strict=True)]

    def ratio(name):
        return round(statistics.median(t[name] / (t["forward"] + t["grams"]) for t in rounds), 3)

    return {
        "batches": arguments.batches,
        "distinct_activations": len(shapes),
        **{f"{name}_s": round(s, 3) for name, s in seconds.items()},
        "gram_gflops_per_s": round(flops / seconds["grams"] / 1e9, 1),
        "collect_over_forward_and_grams": ratio("collect"),
        "target": 1.5,
        "sequential_over_forward_and_grams": ratio("sequential"),
        "sequential_target": 2.0,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 64")
    arguments = parser.parse_args()
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "second_moment": measure(arguments),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
