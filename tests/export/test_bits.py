"""Packing codes of a few bits, against arithmetic on one large integer."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxcompress.export import _bits as bits

STATES = [2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256]


def by_integer(codes, states):
    """Write all codes into one integer, and that as little-endian bytes."""
    width = (states - 1).bit_length()
    whole = sum(int(code) << (i * width) for i, code in enumerate(codes))
    return whole.to_bytes(-(-len(codes) * width // 8), "little")


@hypothesis.given(st.sampled_from(STATES), st.integers(0, 40), st.integers(0, 2**32))
@hypothesis.settings(max_examples=150)
def test_round_trip_and_layout(states, count, seed):
    codes = np.random.default_rng(seed).integers(0, states, count, np.uint8)
    packed = bits.pack_codes(codes, states=states)
    assert packed.dtype == np.uint8 and packed.size == bits.packed_bytes(count, states=states)
    np.testing.assert_array_equal(bits.unpack_codes(packed, count, states=states), codes)
    if states != 3:
        assert packed.tobytes() == by_integer(codes, states)


def test_int4_goes_two_and_int2_four_to_a_byte():
    assert bits.pack_codes(np.array([1, 2, 3], np.uint8), states=16).tolist() == [0x21, 0x03]
    assert bits.pack_codes(np.array([1, 2, 3, 0, 1], np.uint8), states=4).tolist() == [
        0b00111001,
        1,
    ]


def test_ternary_goes_five_to_a_byte():
    codes = np.array([1, 2, 0, 0, 2, 2], np.uint8)
    assert bits.pack_codes(codes, states=3).tolist() == [1 + 2 * 3 + 2 * 81, 2]
    assert bits.packed_bytes(1000, states=3) == 200


@pytest.mark.parametrize("states", [2, 8, 64])
def test_chunks_join_without_a_seam(states, monkeypatch):
    monkeypatch.setattr(bits, "_CHUNK", 16)
    codes = np.random.default_rng(0).integers(0, states, 100, np.uint8)
    packed = bits.pack_codes(codes, states=states)
    assert packed.tobytes() == by_integer(codes, states)
    np.testing.assert_array_equal(bits.unpack_codes(packed, 100, states=states), codes)


def test_several_axes_are_read_row_by_row():
    codes = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(
        bits.pack_codes(codes, states=8), bits.pack_codes(codes.ravel(), states=8)
    )
    turned = np.asfortranarray(codes)
    np.testing.assert_array_equal(
        bits.pack_codes(turned, states=8), bits.pack_codes(codes, states=8)
    )
