"""Packing against compressed-tensors' own packer, the golden bytes of every reader."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from lbq.formats.packing import BITS, PackedWeight, pack, packed_words, unpack

WIDTHS = (1, 7, 10, 31, 32, 33, 100, 192, 539, 576, 4304)


def codes_of(k: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k * 10 + bits)
    return torch.randint(0, 1 << bits, (5, k), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", WIDTHS)
def test_words_equal_those_of_compressed_tensors(k: int, bits: int) -> None:
    codes = codes_of(k, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    expected = pack_to_int32(signed, bits)
    words = pack(codes, bits)
    assert words.shape == (5, packed_words(k, bits))
    assert torch.equal(words, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", WIDTHS)
def test_unpack_is_the_inverse_and_leaves_the_words_alone(k: int, bits: int) -> None:
    codes = codes_of(k, bits)
    words = pack(codes, bits)
    before = words.clone()
    unpack(words, bits, k).zero_()
    assert torch.equal(words, before)
    assert torch.equal(unpack(words, bits, k), codes)


def test_golden_words_at_three_bits() -> None:
    """Codes 0…7 twice: two times the bytes 0b10001000 0b11000110 0b11111010, little endian."""
    codes = torch.arange(16, dtype=torch.uint8).remainder(8).view(1, 16)
    assert pack(codes, 3).view(torch.uint8).tolist() == [[0x88, 0xC6, 0xFA, 0x88, 0xC6, 0xFA, 0, 0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "group"), [(64, 32), (64, 64), (96, 32), (7, 7)])
def test_dequantized_values_are_scale_times_signed_code(k: int, group: int, bits: int) -> None:
    codes = codes_of(k, bits)
    scales = torch.linspace(-2, 3, 5 * (k // group)).view(5, -1).to(torch.bfloat16)
    weight = PackedWeight(pack(codes, bits), scales, bits, group, k)
    words = weight.words.clone()
    expected = scales.double().repeat_interleave(group, 1) * (codes.double() - (1 << (bits - 1)))
    assert torch.equal(weight.dequantize(torch.float32).double(), expected)
    assert torch.equal(weight.rows(1, 3).dequantize(), weight.dequantize()[1:3])
    assert torch.equal(weight.words, words)
