"""The pretrained character model reads Shakespeare at the published 1.91 bits per character."""

import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxcompress import adapters, tree

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from models import char_lstm


@pytest.mark.data
def test_bits_per_character(data_dir):
    vocab = data_dir / "charrnn_shakespeare_vocab.json"
    text = (data_dir / "tinyshakespeare.txt").read_text()
    ids = char_lstm.encode(text[-(len(text) // 10) :], vocab)
    starts = np.linspace(0, len(ids) - 257, 64).astype(int)
    windows = np.stack([ids[start : start + 257] for start in starts])

    variables = char_lstm.load(data_dir / "charrnn_shakespeare.safetensors")
    assert tree.count(variables) == 65 * 128 + 2 * (256 * 512 + 512) + 128 * 65 + 65
    fn, params = adapters.from_linen(char_lstm.CharLSTM(), variables)
    logits = jax.jit(fn)(params, windows[:, :-1])
    bits = -jax.nn.log_softmax(logits) / np.log(2)
    bits = np.take_along_axis(np.asarray(bits), windows[:, 1:, None], axis=-1)[:, 32:]
    assert f"{bits.mean():.2f}" == "1.91"
