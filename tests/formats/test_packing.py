"""Codes in words and back."""

from __future__ import annotations

import pytest
import torch

from lbq.formats.packing import BITS, SCALE_DTYPE, PackedWeight, pack


@pytest.mark.parametrize("bits", BITS)
def test_dequantizing_leaves_the_words_alone(bits):
    codes = torch.randint(0, 1 << bits, (5, 96), dtype=torch.uint8)
    weight = PackedWeight(pack(codes, bits), torch.ones(5, 3, dtype=SCALE_DTYPE), bits, 32, 96)
    expected = codes.to(torch.float32) - (1 << (bits - 1))
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(), expected)
