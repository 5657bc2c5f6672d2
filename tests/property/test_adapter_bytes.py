"""Whatever happens to the bytes of an adapter on their way, nothing but the expected tensors comes out."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.adapter import adapter
from common.errors import ModelError, WireError

NAMES = ("model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight")
TENSORS = {NAMES[0]: torch.arange(6.0).reshape(2, 3), NAMES[1]: torch.arange(8.0).reshape(4, 2)}
SPECS = adapter.specs(TENSORS)
DATA = {dtype: adapter.encode(TENSORS, dtype=dtype) for dtype in ("float32", "bfloat16")}
DTYPES = st.sampled_from(sorted(DATA))


def header_size(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])


def decode_or_refuse(data: bytes, dtype: str) -> dict[str, torch.Tensor] | None:
    """Any other exception than these two is a failure of the test."""
    try:
        return adapter.decode(data, SPECS, dtype=dtype)
    except (WireError, ModelError):
        return None


@given(dtype=DTYPES, flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_header_bytes_never_give_other_names_shapes_or_dtypes(dtype, flips):
    data = bytearray(DATA[dtype])
    for position, mask in flips:
        data[position % (8 + header_size(DATA[dtype]))] ^= mask
    found = decode_or_refuse(bytes(data), dtype)
    if found is not None:
        assert adapter.specs(found) == SPECS
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert sorted(v for t in found.values() for v in t.flatten().tolist()) == sorted(
            v for t in TENSORS.values() for v in t.flatten().tolist()
        )


def test_control_flipped_values_do_come_through():
    """The law above is about the header; values have the frame's hash to protect them."""
    data = bytearray(DATA["float32"])
    data[-2] ^= 0x40
    found = decode_or_refuse(bytes(data), "float32")
    assert found is not None
    assert not all(torch.equal(found[name], TENSORS[name]) for name in NAMES)


@given(dtype=DTYPES, cut=st.integers(0, 400), tail=st.binary(max_size=20))
def test_cut_and_lengthened_bytes_are_refused(dtype, cut, tail):
    data = DATA[dtype][: max(0, len(DATA[dtype]) - cut)] + tail
    if data != DATA[dtype]:
        found = decode_or_refuse(data, dtype)
        assert found is None or len(data) == len(DATA[dtype])


@given(data=st.binary(max_size=300), dtype=DTYPES)
def test_arbitrary_bytes_raise_our_errors_only(data, dtype):
    assert decode_or_refuse(data, dtype) is None


@given(text=st.text(max_size=60) | st.from_regex(r"\{.{0,40}\}"), dtype=DTYPES)
def test_arbitrary_headers_raise_our_errors_only(text, dtype):
    header = text.encode("utf-8", "surrogatepass")
    assert decode_or_refuse(struct.pack("<Q", len(header)) + header + bytes(56), dtype) is None


@given(
    values_f=arrays.arrays("float32", st.integers(1, 30), elements=st.floats(-1e6, 1e6, width=32)),
    dtype=DTYPES,
)
def test_values_survive_in_float32_and_are_rounded_once_in_bfloat16(values_f, dtype):
    tensors = {"w": torch.from_numpy(values_f.copy())}
    found = adapter.decode(adapter.encode(tensors, dtype=dtype), adapter.specs(tensors), dtype=dtype)
    rounded = tensors["w"].to(torch.bfloat16).float() if dtype == "bfloat16" else tensors["w"]
    assert torch.equal(found["w"], rounded)
    again = adapter.decode(adapter.encode(found, dtype=dtype), adapter.specs(found), dtype=dtype)
    assert torch.equal(again["w"], found["w"])


@pytest.mark.parametrize("dtype", sorted(DATA))
def test_every_single_bit_of_the_header_is_covered(dtype):
    """Exhaustive where hypothesis samples."""
    for position in range(8 + header_size(DATA[dtype])):
        for bit in range(8):
            data = bytearray(DATA[dtype])
            data[position] ^= 1 << bit
            found = decode_or_refuse(bytes(data), dtype)
            assert found is None or adapter.specs(found) == SPECS
