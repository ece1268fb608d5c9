"""The zoo's models of sequences, and a few oddities: control flow and rules of one's own."""

from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from models import llama_nnx
from models.char_lstm import CharLSTM
from models.encoder_decoder import EncoderDecoder
from models.gpt2 import GPT2
from models.gpt_neox import GPTNeoX
from models.llama import Llama, LlamaConfig
from models.moe import MoE, NnxMoE, RaggedMoE
from zoo_registry import (
    attention,
    dense,
    linen,
    model,
    names,
    nnx_model,
    once,
    randomised,
    tokens,
    values,
)

from jaxcompress import adapters

# --- Language models ------------------------------------------------------------------------------


@model(
    flops={
        "qkv, out": dense(2 * 3, 4, 12) + dense(2 * 3, 4, 4),
        "attention": attention(2, 2, 3, 3, 2),
        "mlp": dense(2 * 3, 4, 16) + dense(2 * 3, 16, 4),
        "head": dense(2 * 3, 4, 7),
    },
    sites={"wte/embedding": 2} | once("blocks/0/{qkv,out,up,down}/kernel"),
    elsewhere=names(
        "wpe/embedding",  # positions are constants: a slice that is added, not a lookup
        "{norm,blocks/0/norm1,blocks/0/norm2}/{scale,bias}",
        "blocks/0/{qkv,out,up,down}/bias",
    ),
)
def gpt2():
    build = partial(GPT2, 7, 5, dim=4, layers=1, heads=2)
    return nnx_model(build, tokens(2, 3, vocab=7))


@model(
    flops={
        "qkv, out": dense(2 * 3, 8, 24) + dense(2 * 3, 8, 8),
        "attention": attention(2, 2, 3, 3, 4),
        "mlp": dense(2 * 3, 8, 32) + dense(2 * 3, 32, 8),
        "head": dense(2 * 3, 8, 7),
    },
    sites=once("params/{embed/embedding,head/kernel}", "params/layers_0/{qkv,out,up,down}/kernel"),
    elsewhere=names(
        "params/{norm,layers_0/norm1,layers_0/norm2}/{scale,bias}",
        "params/layers_0/{qkv,out,up,down}/bias",
    ),
)
def gpt_neox():
    return linen(GPTNeoX(7, 8, layers=1, heads=2, rotary=2), tokens(2, 3, vocab=7))


LLAMA: dict[str, Any] = {
    "vocab": 7, "dim": 4, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 2, "hidden": 6
}  # fmt: skip
LLAMA_FLOPS = {
    "q, o": 2 * (dense(2 * 3, 4, 8) + dense(2 * 3, 8, 4)),  # two layers of everything
    "k, v": 2 * 2 * dense(2 * 3, 4, 4),
    "attention": 2 * attention(2, 4, 3, 3, 2),
    "mlp": 2 * (2 * dense(2 * 3, 4, 6) + dense(2 * 3, 6, 4)),
    "head": dense(2 * 3, 4, 7),
}


@model(
    flops=LLAMA_FLOPS,
    sites=once(
        "params/{embed/embedding,head/kernel}",
        "params/{layers_0,layers_1}/attention/{q,k,v,o}/kernel",
        "params/{layers_0,layers_1}/{gate,up,down}/kernel",
    ),
    elsewhere=names("params/norm/scale", "params/{layers_0,layers_1}/{norm1,norm2}/scale"),
)
def llama():
    return linen(Llama(LlamaConfig(**LLAMA, scan=False)), tokens(2, 3, vocab=7))


@model(
    flops=LLAMA_FLOPS,
    sites={"params/embed/embedding": 2}  # tied
    | once("params/layers/attention/{q,k,v,o}/kernel", "params/layers/{gate,up,down}/kernel"),
    elsewhere=names("params/{norm,layers/norm1,layers/norm2}/scale"),
)
def llama_scanned():
    return linen(Llama(LlamaConfig(**LLAMA, tied=True)), tokens(2, 3, vocab=7))


@model(
    flops=LLAMA_FLOPS,
    sites=once(
        "{embed/embedding,head/kernel}",
        "layers/attention/{q,k,v,o}/kernel",
        "layers/{gate,up,down}/kernel",
    ),
    elsewhere=names("{norm,layers/norm1,layers/norm2}/scale"),
)
def llama_scanned_nnx():
    build = partial(llama_nnx.Llama, LlamaConfig(**LLAMA))
    return nnx_model(build, tokens(2, 3, vocab=7))


@model(
    flops={
        "encoder, q, k, v, out": 4 * dense(2 * 3, 4, 4),
        "encoder, attention": attention(2, 2, 3, 3, 2),
        "encoder, mlp": dense(2 * 3, 4, 6) + dense(2 * 3, 6, 4),
        "decoder, q, k, v, out": 4 * dense(2 * 5, 4, 4),
        "decoder, attention": attention(2, 2, 5, 5, 2),
        "cross, q, out": 2 * dense(2 * 5, 4, 4),
        "cross, k, v": 2 * dense(2 * 3, 4, 4),
        "cross, attention": attention(2, 2, 5, 3, 2),
        "decoder, mlp": dense(2 * 5, 4, 6) + dense(2 * 5, 6, 4),
        "head": dense(2 * 5, 4, 7),
    },
    sites={"embed/embedding": 3}  # source, target, head
    | once(
        "encoder/0/attention/{query,key,value,out}/kernel",
        "decoder/0/{attention,cross}/{query,key,value,out}/kernel",
        "{encoder,decoder}/0/mlp/{up,down}/kernel",
    ),
    elsewhere=names(
        "encoder/0/attention/{query,key,value,out}/bias",
        "decoder/0/{attention,cross}/{query,key,value,out}/bias",
        "{encoder,decoder}/0/mlp/{up,down}/bias",
        "{encoder/0/norm1,encoder/0/norm2}/{scale,bias}",
        "{decoder/0/norm1,decoder/0/norm2,decoder/0/norm3}/{scale,bias}",
    ),
)
def encoder_decoder():
    build = partial(EncoderDecoder, 7, dim=4, layers=1, heads=2, hidden=6)
    return nnx_model(build, tokens(2, 3, vocab=7), tokens(2, 5, vocab=7))


# --- Experts: 6 tokens, 3 experts with 4 places each, width 4, hidden 5 ---------------------------

MOE_FLOPS = {
    "router": dense(6, 4, 3),
    "dispatch": dense(3 * 4, 6, 4),
    "experts": 3 * (dense(4, 4, 5) + dense(4, 5, 4)),
    "combine": dense(6, 3 * 4, 4),
}


@model(flops=MOE_FLOPS, sites=once("params/{router/kernel,up,down}"))
def moe():
    return linen(MoE(3, 5, 4), values(2, 3, 4))


@model(flops=MOE_FLOPS, sites=once("{router/kernel,up,down}"))
def moe_nnx():
    return nnx_model(partial(NnxMoE, 4, 3, 5, capacity=4), values(2, 3, 4))


@model(
    flops={"router": dense(6, 4, 3), "experts": dense(6, 4, 5) + dense(6, 5, 4)},
    sites=once("{router/kernel,up,down}"),
)
def moe_ragged():
    return nnx_model(partial(RaggedMoE, 4, 3, 5), values(2, 3, 4))


# --- Recurrence -----------------------------------------------------------------------------------


@model(
    flops={
        "cells": 2 * 4 * dense(2, 3 + 3, 4 * 3),  # two layers, four characters
        "head": dense(2 * 4, 3, 5),
    },
    sites=once("params/{embed/embedding,head/kernel}", "params/{cell_0,cell_1}/gates/kernel"),
    elsewhere=names("params/{head,cell_0/gates,cell_1/gates}/bias"),
)
def char_lstm():
    return linen(CharLSTM(5, 3, 2), tokens(2, 4, vocab=5))


class ConvGRU(eqx.Module):
    """A convolution over time, a GRU over what it gives, a linear head: one series at a time."""

    conv: eqx.nn.Conv1d
    norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv1d(2, 3, 3, key=keys[0])
        self.norm = eqx.nn.LayerNorm(3)
        self.cell = eqx.nn.GRUCell(3, 4, key=keys[1])
        self.head = eqx.nn.Linear(4, 3, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map a series (2, time) to 3 outputs."""
        steps = jax.vmap(self.norm)(self.conv(x).T)  # (time - 2, 3)
        state, _ = jax.lax.scan(lambda h, y: (self.cell(y, h), None), jnp.zeros(4), steps)
        return self.head(state)


@model(
    flops={
        "conv": 2 * (2 * 4 * 3) * 3 * 2,  # (2, 3, 4) outputs of a kernel of 3 over 2 channels
        "gru": 4 * (dense(2, 3, 3 * 4) + dense(2, 4, 3 * 4)),
        "head": dense(2, 4, 3),
    },
    sites=once("{conv,head}/weight", "cell/{weight_ih,weight_hh}"),
    elsewhere=names("{conv,norm,head}/bias", "norm/weight", "cell/{bias,bias_n}"),
)
def conv_gru_equinox():
    module = randomised(eqx.filter_eval_shape(ConvGRU, jax.random.key(0)))
    fn, params = adapters.from_equinox(module)
    return jax.vmap(fn, in_axes=(None, 0)), params, (values(2, 2, 6),)


# --- Control flow and rules of one's own ----------------------------------------------------------


@model(
    flops={
        "inputs": dense(2, 3, 4),
        "loop": dense(2, 4, 4),
        "second branch": dense(2, 4, 5) + dense(2, 5, 4) + dense(2, 4, 2),  # the first has less
    },
    sites={"shared": 2, "loop/kernel": 1}  # shared: once in each branch
    | once("inputs/kernel", "branch/{direct,up,down}"),
    elsewhere=["inputs/bias", "loop/threshold"],
    unused=["spare"],
    differentiable=False,
)
def control_flow():
    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["inputs"]["kernel"] + params["inputs"]["bias"])
        loop, branch, shared = params["loop"], params["branch"], params["shared"]
        large = lambda h: jnp.max(jnp.abs(h)) > loop["threshold"]
        h = jax.lax.while_loop(large, lambda h: jnp.tanh(h @ loop["kernel"]) / 2, h)
        direct = lambda h: (h @ branch["direct"]) @ shared
        deep = lambda h: (jax.nn.relu(h @ branch["up"]) @ branch["down"]) @ shared
        return jax.lax.cond(jnp.sum(h) > 0, direct, deep, h)

    shapes = {
        "inputs": {"kernel": (3, 4), "bias": (4,)},
        "loop": {"kernel": (4, 4), "threshold": ()},
        "branch": {"direct": (4, 4), "up": (4, 5), "down": (5, 4)},
        "shared": (4, 2),
        "spare": (2, 2),
    }
    is_shape = lambda x: isinstance(x, tuple)
    params = randomised(jax.tree.map(jnp.zeros, shapes, is_leaf=is_shape))
    params["loop"]["threshold"] = 0.1 * params["loop"]["threshold"]  # so that the loop runs
    return fn, params, (values(2, 3),)


@jax.custom_vjp
def clipped_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` whose gradient to x is cut to ±0.1, and to the kernel doubled."""
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    return jnp.clip(grad @ kernel.T, -0.1, 0.1), 2 * x.T @ grad


clipped_dense.defvjp(_forward, _backward)


class Clipped(nn.Module):
    """Two dense layers with `clipped_dense` between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, 3) to (batch, 2)."""
        x = nn.softplus(nn.Dense(4, name="inputs")(x))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, 5))
        return nn.Dense(2, name="head")(clipped_dense(x, kernel))


@model(
    flops={"inputs": dense(2, 3, 4), "clipped": dense(2, 4, 5), "head": dense(2, 5, 2)},
    sites=once("params/{inputs/kernel,kernel,head/kernel}"),
    elsewhere=names("params/{inputs,head}/bias"),
)
def custom_vjp():
    return linen(Clipped(), values(2, 3))
