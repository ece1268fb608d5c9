"""The character model's text, and windows of it, as the examples use them."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from models import char_lstm

from jaxcompress import adapters

WINDOW, WARM = 256, 32  # characters, and how many of them are not counted


def load_model(folder: pathlib.Path) -> tuple[Callable[..., Any], Any]:
    """Read the pretrained model: fn, and its params."""
    variables = char_lstm.load(folder / "charrnn_shakespeare.safetensors")
    return adapters.from_linen(char_lstm.CharLSTM(), variables)


def read_text(folder: pathlib.Path, *, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the text as ids.

    Returns:
        The first nine tenths, and (windows, WINDOW + 1) spread over the last tenth.
    """
    text = (folder / "tinyshakespeare.txt").read_text()
    ids = char_lstm.encode(text, folder / "charrnn_shakespeare_vocab.json")
    cut = len(ids) - len(ids) // 10
    return ids[:cut], spread(ids[cut:], windows)


def spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Take windows at even distances, (count, WINDOW + 1)."""
    starts = np.linspace(0, len(ids) - WINDOW - 1, count).astype(int)
    return np.stack([ids[start : start + WINDOW + 1] for start in starts])


def counted(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Give the logits of the characters that count, in one list."""
    # (windows, time, vocab) -> (characters that count, vocab)
    return lambda params, x: fn(params, x)[:, WARM:].reshape(-1, 65)
