"""FBGEMM's operators inside torch, and whether this build and CPU have them."""

from __future__ import annotations

from typing import Any

import torch

_ops = torch.ops.quantized
byte_bags: Any = getattr(_ops, "embedding_bag_byte_rowwise_offsets", None)
pack_half: Any = getattr(_ops, "linear_prepack_fp16", None)
half_linear: Any = getattr(_ops, "linear_dynamic_fp16", None)


def missing_fbgemm() -> str | None:
    """Why FBGEMM's kernels cannot serve here, or None when they can."""
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return "torch has no FBGEMM for this CPU: weights are dequantised tile by tile for every token"
    if None in (byte_bags, pack_half, half_linear):
        return f"torch {torch.__version__} lacks FBGEMM's operators: weights are dequantised tile by tile"
    return None
