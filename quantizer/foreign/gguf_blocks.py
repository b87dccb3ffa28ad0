"""The block types of GGUF: 32 or 256 neighbouring weights in so many bytes, as codes and the scales of their groups.

Every type here is scale · (code − middle) or scale · code + bias with one scale for 16 or 32 weights; in the K-quants
scales and biases are products of a half-precision number of the block and a small integer of the group. The layouts are
those of ``ggml-quants.c`` (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lbq.quantizer.foreign.layout import Setting


class Blocks(NamedTuple):
    """Codes uint8 [B, block]; scales and biases [B, block/group], the biases None where codes are around the middle."""

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """``read`` takes uint8 [B, nbytes]."""

    name: str
    block: int
    nbytes: int
    setting: Setting
    read: Callable[[torch.Tensor], Blocks]


def _half(raw: torch.Tensor, at: int) -> torch.Tensor:
    """The half-precision number at byte ``at``: [B, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16)


def _bits(raw: torch.Tensor, count: int) -> torch.Tensor:
    """Fields of ``count`` bits, from the low ones on: [B, C] to [B, 8/count, C]."""
    shifts = torch.arange(0, 8, count, dtype=torch.uint8).view(1, -1, 1)
    return (raw.unsqueeze(1) >> shifts) & ((1 << count) - 1)


def _planes(raw: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """:func:`_bits` of runs of ``width`` bytes, one run after the other: [B, C] to [B, C · 8/count]."""
    return _bits(raw.reshape(-1, width), count).reshape(raw.shape[0], -1)


def _high(raw: torch.Tensor) -> torch.Tensor:
    """32 bits in the order of the weights: [B, 4] to [B, 32]."""
    return _bits(raw, 1).transpose(1, 2).reshape(raw.shape[0], -1)


def _q4_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_planes(raw[:, 2:], 16, 4), _half(raw, 0))


def _q4_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_planes(raw[:, 4:], 16, 4), _half(raw, 0), _half(raw, 2))


def _q5_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_planes(raw[:, 6:], 16, 4) | _high(raw[:, 2:6]) << 4, _half(raw, 0))


def _q5_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_planes(raw[:, 8:], 16, 4) | _high(raw[:, 4:8]) << 4, _half(raw, 0), _half(raw, 2))


def _q8_0(raw: torch.Tensor) -> Blocks:
    return Blocks(raw[:, 2:] ^ 0x80, _half(raw, 0))  # signed to unsigned


def _q2_k(raw: torch.Tensor) -> Blocks:
    scale, least = (raw[:, :16] & 15).float(), (raw[:, :16] >> 4).float()
    codes = _planes(raw[:, 16:80], 32, 2)
    return Blocks(codes, _half(raw, 80).float() * scale, -_half(raw, 82).float() * least)


def _q3_k(raw: torch.Tensor) -> Blocks:
    low, high = _planes(raw[:, 96:104], 8, 4), _planes(raw[:, 104:108], 4, 2)  # of 6-bit scales
    scale = (low | high << 4).float() - 32
    codes = _planes(raw[:, 32:96], 32, 2) | _planes(raw[:, :32], 32, 1) << 2
    return Blocks(codes, _half(raw, 108).float() * scale)


def _scales_and_biases(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a Q4_K or Q5_K block: eight 6-bit numbers each in bytes 4 to 16, the last four of each in two pieces."""
    first, second, ends = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scale = torch.cat((first & 63, ends & 15 | first >> 6 << 4), 1).float()
    least = torch.cat((second & 63, ends >> 4 | second >> 6 << 4), 1).float()
    return _half(raw, 0).float() * scale, -_half(raw, 2).float() * least


def _q4_k(raw: torch.Tensor) -> Blocks:
    return Blocks(_planes(raw[:, 16:], 32, 4), *_scales_and_biases(raw))


def _q5_k(raw: torch.Tensor) -> Blocks:
    codes = _planes(raw[:, 48:], 32, 4) | _planes(raw[:, 16:48], 32, 1) << 4
    return Blocks(codes, *_scales_and_biases(raw))


def _q6_k(raw: torch.Tensor) -> Blocks:
    codes = _planes(raw[:, :128], 64, 4) | _planes(raw[:, 128:192], 32, 2) << 4
    return Blocks(codes, _half(raw, 208).float() * raw[:, 192:208].view(torch.int8).float())


BLOCK_TYPES = {  # by the number in a file
    2: BlockType("Q4_0", 32, 18, Setting(4, 32, True), _q4_0),
    3: BlockType("Q4_1", 32, 20, Setting(4, 32, False), _q4_1),
    6: BlockType("Q5_0", 32, 22, Setting(5, 32, True), _q5_0),
    7: BlockType("Q5_1", 32, 24, Setting(5, 32, False), _q5_1),
    8: BlockType("Q8_0", 32, 34, Setting(8, 32, True), _q8_0),
    10: BlockType("Q2_K", 256, 84, Setting(2, 16, False), _q2_k),
    11: BlockType("Q3_K", 256, 110, Setting(3, 16, True), _q3_k),
    12: BlockType("Q4_K", 256, 144, Setting(4, 32, False), _q4_k),
    13: BlockType("Q5_K", 256, 176, Setting(5, 32, False), _q5_k),
    14: BlockType("Q6_K", 256, 210, Setting(6, 16, True), _q6_k),
}
