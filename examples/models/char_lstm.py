"""A character model of stacked LSTMs in Flax Linen, as trained by char-rnn-tensorflow.

The cell is TensorFlow's BasicLSTMCell: one matrix over the concatenation of input and state,
gates in the order i, j, f, o, and 1 added to the forget gate before its sigmoid.
"""

import json
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file


class BasicLSTMCell(nn.RNNCellBase):
    """`c' = σ(f + 1) c + σ(i) tanh(j)`, `h' = σ(o) tanh(c')` with `i, j, f, o = [x, h] W + b`.

    Attributes:
        features: Width of the state.
    """

    features: int

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Take one step: carry `(c, h)` and inputs (batch, width) to `(carry, h)`."""
        c, h = carry
        gates = nn.Dense(4 * self.features, name="gates")(jnp.concatenate([inputs, h], axis=-1))
        i, j, f, o = jnp.split(gates, 4, axis=-1)
        c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * jnp.tanh(j)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Start from zeros; `rng` is what `nn.RNN` hands over, and is not used."""
        zeros = jnp.zeros((*input_shape[:-1], self.features))
        return zeros, zeros

    @property
    def num_feature_axes(self) -> int:
        """Axes of the input that are features."""
        return 1


class CharLSTM(nn.Module):
    """Characters to logits of the next one.

    Attributes:
        vocab: Number of characters.
        features: Width of the embedding and of every layer.
        layers: Number of LSTMs.
    """

    vocab: int = 65
    features: int = 128
    layers: int = 2

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Map ids (batch, time) to logits (batch, time, vocab), from a state of zeros."""
        x = nn.Embed(self.vocab, self.features, name="embed")(characters)
        for layer in range(self.layers):
            x = nn.RNN(BasicLSTMCell(self.features, name=f"cell_{layer}"))(x)
        return nn.Dense(self.vocab, name="head")(x)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the variables of a `CharLSTM` from a checkpoint with char-rnn-tensorflow's names.

    Args:
        path: The safetensors file.

    Returns:
        Linen variables. Sizes are those of the checkpoint: two layers of 128 for ml5's
        Shakespeare model.
    """
    tensors = {name: jnp.asarray(tensor) for name, tensor in load_file(path).items()}
    params: dict[str, Any] = {
        "embed": {"embedding": tensors["embedding"]},
        "head": {"kernel": tensors["rnnlm/softmax_w"], "bias": tensors["rnnlm/softmax_b"]},
    }
    for layer in range(sum(name.endswith("basic_lstm_cell/weights") for name in tensors)):
        cell = f"rnnlm/multi_rnn_cell/cell_{layer}/basic_lstm_cell"
        gates = {"kernel": tensors[f"{cell}/weights"], "bias": tensors[f"{cell}/biases"]}
        params[f"cell_{layer}"] = {"gates": gates}
    return {"params": params}


def encode(text: str, vocab: str | os.PathLike[str]) -> np.ndarray:
    """Turn text into ids.

    Args:
        text: Text of characters that the model knows.
        vocab: A JSON list, id to character.

    Returns:
        Ids, int32, one per character.
    """
    characters = json.loads(pathlib.Path(vocab).read_text())
    ids = {character: i for i, character in enumerate(characters)}
    return np.array([ids[character] for character in text], np.int32)
