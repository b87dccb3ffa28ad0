"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves paired as in GPT-NeoX and Llama."""

from __future__ import annotations

import math

import torch

from lbq.formats.spec import LinearScaling, Llama3Scaling, Rope


def inverse_frequencies(rope: Rope) -> torch.Tensor:
    """Radians a position for each pair of dimensions, float32 [dims/2], scaling applied.

    float32 and this order of operations are what the models were trained with.
    """
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
    frequencies = 1.0 / torch.pow(rope.theta, exponents)
    if isinstance(rope.scaling, LinearScaling):
        return frequencies / rope.scaling.factor
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3(frequencies, rope.scaling)
    return frequencies


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1: slow pairs are stretched by ``factor``, fast ones kept, those between interpolated."""
    turns = scaling.original_context * frequencies / (2 * math.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1) if high != low else (turns >= low).to(torch.float32)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class Rotary:
    """One rope on one device; layers with the same rope share it."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self.dims = rope.dims
        self._frequencies = inverse_frequencies(rope).to(device, non_blocking=True)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines [T, 1, 1, dims/2] and signed sines (−sin, sin) [T, 1, 2, dims/2] of int64 positions [T]."""
        angles = (positions.to(torch.float32).unsqueeze(1) * self._frequencies).view(-1, 1, 1, self.dims // 2)
        sin = angles.sin()
        return angles.cos(), torch.cat((-sin, sin), dim=2)

    def rotate_(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate the first ``dims`` of every head of [T, heads, head_dim] in place."""
        tokens, count, _ = heads.shape
        halves = heads[:, :, : self.dims].view(tokens, count, 2, -1)
        swapped = halves.flip(2)
        halves.mul_(cos).addcmul_(swapped, sin)
