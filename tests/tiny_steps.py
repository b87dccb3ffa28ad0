"""What tests of steps of tiny models share: where they run, the models' shape, and how far two logits are apart.

Under Triton's interpreter a program takes a twentieth of a second, so that shapes have few of them.
"""

from __future__ import annotations

from functools import partial

import torch

from lbq.runtime.bench.weights import DeviceKernels
from lbq.runtime.kernels.gemv.triton import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
Kernels = partial(DeviceKernels, DEVICE)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def token_ids(count: int, seed: int) -> list[int]:
    """Ids of the vocabulary that tiny models have."""
    return [int(i) for i in torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed))]


def divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL of each row of logits [..., V], float64 [...] on the CPU."""
    p, q = expected.double().cpu().log_softmax(-1), got.double().cpu().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
