"""Batches: iterables of input tuples for fn, read once."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError


def as_inputs(batch: Any) -> tuple[Any, ...]:
    """Read one batch as fn's inputs.

    Args:
        batch: A tuple; anything else, such as a lone array, counts as a one-tuple.

    Returns:
        The tuple.

    Example:
        >>> as_inputs((1.0, 2.0)), as_inputs(1.0)
        ((1.0, 2.0), (1.0,))
    """
    return batch if isinstance(batch, tuple) else (batch,)


def open_stream(batches: Any) -> tuple[tuple[Any, ...], Iterator[tuple[Any, ...]]]:
    """Read the first batch, and make an iterator over those after it.

    Args:
        batches: An iterable of batches; see `as_inputs`.

    Returns:
        The first batch and the others, as tuples of inputs. The iterator raises `StructureError`
        at a batch that is structured unlike the first; only sizes may differ.

    Raises:
        ArgumentError: If there are no batches.
        ArgumentTypeError: If `batches` is no iterable, a string or a mapping.

    Example:
        >>> first, rest = open_stream([np.zeros(2), np.zeros(3)])
        >>> first[0].shape, [batch[0].shape for batch in rest]
        ((2,), [(3,)])
    """
    if isinstance(batches, str | Mapping) or not hasattr(batches, "__iter__"):
        raise ArgumentTypeError(
            "batches",
            got=type(batches).__name__,
            expected="an iterable of input tuples for fn",
            fix="Pass a list of batches, or a generator.",
        )
    stream = map(as_inputs, batches)
    first = next(stream, None)
    if first is None:
        raise ArgumentError(
            "batches",
            got="no batches",
            expected="at least one",
            fix="An iterator that was read before is empty: make it anew.",
        )
    return first, _match_stream(stream, first)


def _match_stream(stream: Iterator[tuple], first: tuple) -> Iterator[tuple]:
    """Pass batches on that are structured like the first."""
    expected = _form_of(first)
    for number, batch in enumerate(stream, start=1):
        if _form_of(batch) != expected:
            raise StructureError(
                "batches",
                got=f"batch {number} with {_sketch(batch)}",
                expected=f"the structure, ranks and dtypes of the first: {_sketch(first)}",
                fix="Give all batches one form; only sizes may differ.",
            )
        yield batch


def _form_of(batch: tuple) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.ndim(x), _dtype_of(x)) for x in leaves]


def _sketch(batch: tuple) -> str:
    return str(jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype_of(x)), batch))


def _dtype_of(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)
