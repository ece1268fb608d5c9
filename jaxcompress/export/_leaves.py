"""One leaf as a short record plus entries in pools, and back.

Records are JSON lists: `["a", dtype, shape]` an array, `["q", format, values' shape, scale's shape,
dtype]` a QArray, `["k", implementation, data's shape]` random keys, `["p", value]` a Python number.
A QArray with a global scale, or with the form of its activations, has an object with `"global"` or
`"activation"` appended; an array or QArray with a mask then has `1` appended.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import numerics
from jaxcompress.errors import ArgumentError, ArgumentTypeError, StructureError
from jaxcompress.export import _bits as bits
from jaxcompress.export._pools import BITS, DECLARED, Reader, Writer, entries_in

# Arrays whose entries take less than a byte -> (states, is signed).
_NARROW = {"bool": (2, False), "float4_e2m1fn": (16, False)}
_NARROW |= {"int2": (4, True), "uint2": (4, False), "int4": (16, True), "uint4": (16, False)}

_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")


def write_leaf(path: str, leaf: Any, mask: Any, formats: list[Any], writer: Writer) -> list[Any]:
    """Put a leaf's entries into pools and give its record.

    Args:
        path: The leaf's path, for errors.
        leaf: An array, a QArray, random keys, or a Python number.
        mask: A bool array, or `None`.
        formats: The formats met so far; a new one is appended.
        writer: The pools.

    Returns:
        The record.

    Raises:
        ArgumentTypeError: If it is something else.
        ArgumentError: If a pruned entry is not zero.
        StructureError: If the mask is no bool array of the leaf's shape.
    """
    kept = None if mask is None else _read_mask(path, leaf, mask)
    tail = [] if kept is None else [1]
    if kept is not None:
        writer.put(BITS, bits.pack_codes(kept.view(np.uint8), states=2))
    if isinstance(leaf, numerics.QArray):
        return [*_write_qarray(path, leaf, kept, formats, writer), *tail]
    if isinstance(leaf, bool | int | float):
        return ["p", leaf]
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        writer.put("uint32", data)
        return ["k", str(jax.random.key_impl(leaf)), list(data.shape)]
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or not _is_known(leaf.dtype):
        raise ArgumentTypeError(
            "params",
            got=f"{path!r}, a {type(leaf).__name__}" + (f" of dtype {dtype}" if dtype else ""),
            expected="arrays, QArrays, random keys and Python numbers",
            fix="Leave it out, for example with eqx.partition(model, eqx.is_array).",
        )
    array = np.asarray(leaf)
    if kept is not None and np.any(array[~kept] != 0):
        raise _make_not_zero_error(path, int(np.sum(array[~kept] != 0)))
    _write_entries(array if kept is None else array[kept], writer)
    return ["a", array.dtype.name, list(array.shape), *tail]


def read_leaf(record: list[Any], formats: list[Any], reader: Reader) -> tuple[Any, Any]:
    """Undo `write_leaf`.

    Args:
        record: The record.
        formats: The file's formats.
        reader: The pools.

    Returns:
        The leaf and its mask, or `None`.

    Raises:
        ValueError: If the record makes no sense.
    """
    kind, *fields = record
    if kind == "p":
        return fields[0], None
    if kind == "k":
        implementation, shape = fields
        if implementation not in _KEYS:
            raise ValueError(f"it holds random keys of the unknown kind {implementation!r}")
        data = reader.take("uint32", entries_in(shape)).reshape(shape)
        return jax.random.wrap_key_data(jnp.array(data), impl=implementation), None
    if kind == "a":
        dtype, shape, *masked = fields
        kept = _take_mask(tuple(shape), reader) if masked else None
        count = entries_in(shape) if kept is None else int(kept.sum())
        entries = _take_entries(dtype, count, reader)
        return _to_device(
            _scatter_kept(entries, shape, kept, np.zeros((), entries.dtype))
        ), _to_mask(kept)
    if kind == "q":
        return _read_qarray(formats, reader, *fields)
    raise ValueError(f"it holds a leaf of the unknown kind {kind!r}")


def _is_known(dtype: Any) -> bool:
    return dtype.name in DECLARED or dtype.name in _NARROW


def _read_mask(path: str, leaf: Any, mask: Any) -> np.ndarray:
    kept = np.asarray(mask)
    is_array = isinstance(leaf, numerics.QArray) or _is_known(getattr(leaf, "dtype", np.dtype("O")))
    if kept.dtype != bool or not is_array or kept.shape != tuple(leaf.shape):
        of = f"shape {list(leaf.shape)}" if is_array else f"type {type(leaf).__name__}"
        raise StructureError(
            "mask",
            got=f"{kept.dtype}{list(kept.shape)} at {path!r}, a leaf of {of}",
            expected="a bool array of the leaf's shape, or None",
            fix="Make it with sparsity.make_mask, from the same params.",
        )
    return np.ascontiguousarray(kept)


def _make_not_zero_error(path: str, count: int, why: str = "") -> ArgumentError:
    return ArgumentError(
        "params",
        got=f"{path!r} with {count} entries that are not 0 where its mask prunes{why}",
        expected="params that are exactly zero wherever the mask prunes",
        fix="Call sparsity.apply(params, mask) first, or save without the mask.",
    )


# --- Entries of arrays ------------------------------------------------------------------------


def _write_entries(entries: np.ndarray, writer: Writer) -> None:
    name = entries.dtype.name
    if name in _NARROW:
        states, signed = _NARROW[name]
        writer.put(BITS, bits.pack_codes(_to_codes(entries, states, signed), states=states))
    else:
        writer.put(name, entries)


def _take_entries(name: str, count: int, reader: Reader) -> np.ndarray:
    if name in DECLARED:
        return reader.take(name, count)
    if name not in _NARROW:
        raise ValueError(f"it holds the unknown dtype {name!r}")
    states, signed = _NARROW[name]
    return _from_codes(_take_codes(count, states, reader), jnp.dtype(name), states, signed)


def _take_codes(count: int, states: int, reader: Reader) -> np.ndarray:
    data = reader.take(BITS, bits.packed_bytes(count, states=states))
    return bits.unpack_codes(data, count, states=states)


def _take_mask(shape: tuple[int, ...], reader: Reader) -> np.ndarray:
    return _take_codes(entries_in(shape), 2, reader).view(bool).reshape(shape)


def _to_codes(entries: np.ndarray, states: int, signed: bool) -> np.ndarray:
    """Give the bit patterns of narrow entries, two's complement cut to its low bits."""
    if jnp.issubdtype(entries.dtype, jnp.integer):
        entries = entries.astype(np.int8 if signed else np.uint8)
    codes = entries.view(np.uint8)
    return codes & np.uint8(2 ** bits.width(states) - 1) if signed else codes


def _from_codes(codes: np.ndarray, dtype: Any, states: int, signed: bool) -> np.ndarray:
    if signed:
        blank = np.uint8(8 - bits.width(states))
        return ((codes << blank).view(np.int8) >> blank.astype(np.int8)).astype(dtype)
    return codes.astype(dtype) if jnp.issubdtype(dtype, jnp.integer) else codes.view(dtype)


def _scatter_kept(
    entries: np.ndarray, shape: tuple[int, ...], kept: np.ndarray | None, zero: np.ndarray
) -> np.ndarray:
    """Put kept entries back where they were, and zeros between them."""
    if kept is None:
        return entries.reshape(shape)
    array = np.broadcast_to(zero, shape).copy()
    array[kept] = entries
    return array


def _to_device(array: np.ndarray) -> Any:
    """Bring an array to the device; one of 64 bits stays with NumPy where JAX would narrow it."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array.copy()
    return jnp.array(array)


def _to_mask(kept: np.ndarray | None) -> Any:
    return None if kept is None else jnp.array(kept)


# --- QArrays ----------------------------------------------------------------------------------


def _count_states(qtype: Any) -> int:
    return len(qtype.levels) if isinstance(qtype, numerics.Codebook) else 2**qtype.bits


def _is_signed(qtype: Any) -> bool:
    return isinstance(qtype, numerics.Int) and qtype.signed


def _write_qarray(
    path: str, q: numerics.QArray, kept: np.ndarray | None, formats: list[Any], writer: Writer
) -> list[Any]:
    qtype = q.format.qtype
    values, scale = np.asarray(q.values), np.asarray(q.scale)
    zero = None if q.zero is None else np.asarray(q.zero)
    q = dataclasses.replace(q, values=values, scale=scale, zero=zero)
    if kept is not None:
        _check_pruned(path, q, kept)
        values = values[_block(q.format, kept)]
    codes = _to_codes(values, _count_states(qtype), _is_signed(qtype))
    if codes.size and int(codes.max()) >= _count_states(qtype):
        raise ArgumentError(
            "params",
            got=f"{path!r}, a {qtype.name} with the code {int(codes.max())}",
            expected=f"codes below {_count_states(qtype)}",
            fix="Make QArrays with numerics.quantize or quantize.pack.",
        )
    writer.put(BITS, bits.pack_codes(codes, states=_count_states(qtype)))
    _write_entries(scale, writer)
    if zero is not None:
        _write_entries(zero, writer)
    shapes = [list(np.shape(q.values)), list(scale.shape)]
    record = ["q", _index(q.format, formats), *shapes, np.dtype(q.dtype).name]
    more = _write_more(path, q, formats, writer)
    return [*record, more] if more else record


def _write_more(
    path: str, q: numerics.QArray, formats: list[Any], writer: Writer
) -> dict[str, Any]:
    """Write what most QArrays lack: a global scale, the form of their activations."""
    if (q.global_scale is not None) != q.format.global_scale:
        raise ArgumentError(
            "params",
            got=f"{path!r}, a QArray whose format has global_scale={q.format.global_scale}, with "
            f"global_scale={q.global_scale!r}",
            expected="a global scale exactly where the format has one",
            fix="Make QArrays with numerics.quantize or quantize.pack.",
        )
    more: dict[str, Any] = {}
    if q.global_scale is not None:
        more["global"] = _write_part(path, q.global_scale, writer)
    if q.activation is not None:
        parts = (q.activation.scale, q.activation.zero)
        written = [None if part is None else _write_part(path, part, writer) for part in parts]
        more["activation"] = [_index(q.activation.format, formats), *written]
    return more


def _write_part(path: str, part: Any, writer: Writer) -> list[Any]:
    array = np.asarray(part)
    if not _is_known(array.dtype):
        raise ArgumentTypeError(
            "params",
            got=f"{path!r}, a QArray with a part of dtype {array.dtype}",
            expected="scales and zero points that are numbers",
            fix="Make QArrays with numerics.quantize or quantize.pack.",
        )
    _write_entries(array, writer)
    return [array.dtype.name, list(array.shape)]


def _index(format: numerics.Format, formats: list[Any]) -> int:
    """Give a format's place in the list, appended where it is new."""
    if format not in formats:
        formats.append(format)
    return formats.index(format)


def _read_qarray(
    formats: list[Any],
    reader: Reader,
    index: int,
    shape: list[int],
    scale_shape: list[int],
    dtype: str,
    *tail: Any,
) -> tuple[numerics.QArray, Any]:
    more = tail[0] if tail and isinstance(tail[0], dict) else {}
    masked = tail[1:] if more else tail
    format = formats[index]
    qtype = format.qtype
    logical = format.granularity.unblocked_shape(tuple(shape))
    kept = _take_mask(logical, reader) if masked else None
    blocked = None if kept is None else _block(format, kept)
    count = entries_in(tuple(shape)) if blocked is None else int(blocked.sum())
    codes = _take_codes(count, _count_states(qtype), reader)
    entries = _from_codes(codes, qtype.storage, _count_states(qtype), _is_signed(qtype))
    scales = entries_in(tuple(scale_shape))
    scale = _take_entries(format.scale_dtype.name, scales, reader).reshape(scale_shape)
    zero = None
    if not format.symmetric:
        zero = _take_entries(np.dtype(qtype.storage).name, scales, reader).reshape(scale_shape)
    values = _scatter_kept(entries, tuple(shape), blocked, _zero_code(format, zero))
    if dtype not in DECLARED:
        raise ValueError(f"it holds the unknown dtype {dtype!r}")
    if ("global" in more) != format.global_scale:
        raise ValueError("it holds a QArray whose format and global scale do not go together")
    global_scale = _read_part(more.get("global"), reader)
    q = numerics.QArray(
        values=jnp.array(values),
        scale=jnp.array(scale),
        zero=None if zero is None else jnp.array(zero),
        global_scale=global_scale,
        activation=_read_activation(more.get("activation"), formats, reader),
        format=format,
        dtype=jnp.dtype(dtype),
    )
    return q, _to_mask(kept)


def _read_activation(
    record: list[Any] | None, formats: list[Any], reader: Reader
) -> numerics.Activation | None:
    if record is None:
        return None
    index, *parts = record
    scale, zero = (_read_part(part, reader) for part in parts)
    return numerics.Activation(format=formats[index], scale=scale, zero=zero)


def _read_part(record: list[Any] | None, reader: Reader) -> Any:
    if record is None:
        return None
    dtype, shape = record
    return jnp.array(_take_entries(dtype, entries_in(shape), reader).reshape(shape))


def _block(format: numerics.Format, kept: np.ndarray) -> np.ndarray:
    return np.asarray(format.granularity.block(jnp.asarray(kept)))


def _zero_code(format: numerics.Format, zero: np.ndarray | None) -> np.ndarray:
    """Give the code of the number 0: one, or one per slice."""
    if zero is not None:
        return zero
    levels = getattr(format.qtype, "levels", (0.0,))
    code = levels.index(0.0) if 0.0 in levels else 0
    return np.zeros((), format.qtype.storage) + np.array(code).astype(format.qtype.storage)


def _check_pruned(path: str, q: numerics.QArray, kept: np.ndarray) -> None:
    """Refuse a QArray that would not come back: pruned codes are read back as the code of 0."""
    values, blocked = np.asarray(q.values), _block(q.format, kept)
    zero = _zero_code(q.format, None if q.zero is None else np.asarray(q.zero))
    restored = np.where(blocked, values, np.broadcast_to(zero, values.shape))
    numbers = np.asarray(numerics.dequantize(q))
    wrong = np.sum(numbers[~kept] != 0)
    if not wrong and not np.array_equal(restored, values):
        # Zero by another code than ours, such as -0: fine, if ours is zero as well.
        again = dataclasses.replace(q, values=jnp.array(restored))
        wrong = np.sum(np.asarray(numerics.dequantize(again))[~kept] != 0)
    if wrong:
        has_zero = 0.0 in getattr(q.format.qtype, "levels", (0.0,))
        why = "" if has_zero else f" ({q.format.qtype.name} cannot hold 0)"
        raise _make_not_zero_error(path, int(wrong), why)
