"""Checkpoints that other tools quantised: compressed-tensors, GPTQ, AWQ, AutoRound, MLX and GGUF."""

from __future__ import annotations

from lbq.quantizer.foreign.checkpoint import ForeignCheckpoint, open_foreign
from lbq.quantizer.foreign.coded import Coded, NoImage

__all__ = ["Coded", "ForeignCheckpoint", "NoImage", "open_foreign"]
