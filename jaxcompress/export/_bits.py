"""Codes of a few bits, packed without gaps.

A code has `states` possible values. Codes fill bytes from the least significant bit up, and may
straddle two bytes; three states go five to a byte instead, as digits of base 3.
"""

import math

import numpy as np

_CHUNK = 1 << 20  # codes at a time, a multiple of 8, where packing widens them to bits
_BASE3 = 3 ** np.arange(5, dtype=np.uint8)


def width(states: int) -> int:
    """Give the bits of one code: 4 for 16 states.

    Args:
        states: How many values a code may have, 2 to 256.

    Returns:
        Bits.
    """
    return (states - 1).bit_length()


def packed_bytes(count: int, *, states: int) -> int:
    """Give the bytes that codes take.

    Args:
        count: How many codes.
        states: How many values each may have.

    Returns:
        Bytes.
    """
    return math.ceil(count / 5) if states == 3 else math.ceil(count * width(states) / 8)


def pack_codes(codes: np.ndarray, *, states: int) -> np.ndarray:
    """Pack codes.

    Args:
        codes: uint8, each below `states`; read in row-major order.
        states: How many values each may have.

    Returns:
        uint8 bytes; the bits after the last code are 0.
    """
    codes, bits = np.ravel(codes), width(states)
    if states == 3:
        return _pad_rows(codes, 5) @ _BASE3  # at most 2 * 121
    if bits == 8:
        return codes
    if bits in (2, 4):
        places = np.arange(0, 8, bits, dtype=np.uint8)
        return np.bitwise_or.reduce(_pad_rows(codes, 8 // bits) << places, axis=1)
    chunks = [_pack_bits(codes[i : i + _CHUNK], bits) for i in range(0, codes.size, _CHUNK)]
    return np.concatenate(chunks) if chunks else codes


def unpack_codes(data: np.ndarray, count: int, *, states: int) -> np.ndarray:
    """Undo `pack_codes`.

    Args:
        data: `packed_bytes(count, states=states)` bytes.
        count: How many codes there are.
        states: How many values each may have.

    Returns:
        uint8 codes, one axis.
    """
    bits = width(states)
    if states == 3:
        return (data[:, None] // _BASE3 % 3).astype(np.uint8).reshape(-1)[:count]
    if bits == 8:
        return data
    if bits in (2, 4):
        places = np.arange(0, 8, bits, dtype=np.uint8)
        return ((data[:, None] >> places) & (2**bits - 1)).reshape(-1)[:count]
    step = _CHUNK * bits // 8
    chunks = [_unpack_bits(data[i : i + step], bits) for i in range(0, data.size, step)]
    return np.concatenate(chunks)[:count] if chunks else data


def _pad_rows(codes: np.ndarray, size: int) -> np.ndarray:
    return np.pad(codes, (0, -codes.size % size)).reshape(-1, size)


def _pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    columns = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")  # (n, bits)
    return np.packbits(columns, bitorder="little")


def _unpack_bits(data: np.ndarray, bits: int) -> np.ndarray:
    stream = np.unpackbits(data, bitorder="little")
    columns = stream[: stream.size // bits * bits].reshape(-1, bits)
    return np.packbits(columns, axis=1, bitorder="little")[:, 0]
