"""How a model enters the zoo: its builder, and the truth about its graph, counted by hand."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcompress import adapters, tree


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the zoo, and the truth about it.

    Attributes:
        name: Its key in `ZOO`.
        build: Gives `(fn, params, inputs)`, built once.
        flops: Of all contractions, 2 per multiply-add; a scan's body times its length, a while
            loop's once, a cond's costliest branch; convolutions by output element.
        sites: How many sites each contracted or looked-up leaf has; a stacked leaf has 1.
        elsewhere: Paths of leaves consumed only outside contractions.
        unused: Paths that fn never computes with.
        differentiable: Whether reverse mode works.
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, tuple[jax.Array, ...]]]
    flops: int
    sites: Mapping[str, int]
    elsewhere: frozenset[str]
    unused: frozenset[str]
    differentiable: bool


ZOO: dict[str, Model] = {}


def model(
    *,
    flops: Mapping[str, int],
    sites: Mapping[str, int],
    elsewhere: Iterable[str] = (),
    unused: Iterable[str] = (),
    differentiable: bool = True,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a builder under its name, with FLOPs as named terms to be added up."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        cached = functools.cache(build)
        ZOO[build.__name__] = Model(
            name=build.__name__,
            build=cached,
            flops=sum(flops.values()),
            sites=sites,
            elsewhere=frozenset(elsewhere),
            unused=frozenset(unused),
            differentiable=differentiable,
        )
        return cached

    return register


def names(*patterns: str) -> list[str]:
    """Write out the braces: `a/{b,c}` is `a/b`, `a/c`."""
    parts = [[p.split(",") for p in re.split(r"[{}]", pattern)] for pattern in patterns]
    return [
        "".join(choice) for alternatives in parts for choice in itertools.product(*alternatives)
    ]


def once(*patterns: str) -> dict[str, int]:
    """One site at each of these paths."""
    return dict.fromkeys(names(*patterns), 1)


def dense(rows: int, inputs: int, outputs: int) -> int:
    """FLOPs of (rows, inputs) @ (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def conv(pixels: int, kernel: int, inputs: int, outputs: int) -> int:
    """FLOPs of a convolution: output pixels, side of the kernel, inputs of one group, outputs."""
    return 2 * pixels * outputs * kernel**2 * inputs


def attention(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """FLOPs of the scores and of the weighted values."""
    return 2 * (2 * batch * heads * queries * keys * head_dim)


def randomised(params: Any) -> Any:
    """Fill shapes with values, by NumPy since JAX would compile a draw for every shape.

    Kernels keep the scale of what goes through them; norm scales and variances are around 1,
    everything else of one axis is small, and nothing is all 0 or all 1.
    """
    counter = itertools.count()

    def draw(path: str, leaf: Any) -> Any:
        rng, last = np.random.default_rng(next(counter)), path.split("/")[-1]
        if not tree.is_floating(leaf):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.key(0) if is_key else jnp.zeros(leaf.shape, leaf.dtype)
        if last in ("scale", "var", "gamma", "threshold"):
            x = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = math.prod(leaf.shape[:-1]) if last not in ("bias", "mean") else 10
            x = rng.standard_normal(leaf.shape) / math.sqrt(fan_in)
        return jnp.asarray(x, leaf.dtype)

    return tree.map_with_path(draw, params)


def linen(module: nn.Module, *inputs: jax.Array, **keywords: Any) -> Any:
    """`(fn, params, inputs)` of a Linen module, with random values everywhere."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return *adapters.from_linen(module, randomised(variables), **keywords), inputs


def nnx_model(
    build: Callable[..., nnx.Module],
    *inputs: jax.Array,
    mutable: Any = None,
    train: bool = False,
) -> Any:
    """`(fn, params, inputs)` of the NNX module `build(rngs=...)`, likewise."""
    module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    module.train() if train else module.eval()
    fn, params = adapters.from_nnx(module, mutable=mutable)
    return fn, randomised(params), inputs


def values(*shape: int) -> jax.Array:
    """Inputs that are all different."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def tokens(*shape: int, vocab: int) -> jax.Array:
    """Random tokens."""
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab, shape), jnp.int32)
