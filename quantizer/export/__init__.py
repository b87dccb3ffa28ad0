"""Artifacts for other tools: checkpoints of vLLM, SGLang, GPTQ, AWQ and AutoRound, and GGUF files."""

from __future__ import annotations

from lbq.quantizer.export.write import TARGETS, Exported, export, prepare_export, replaceable, write_export

__all__ = ["TARGETS", "Exported", "export", "prepare_export", "replaceable", "write_export"]
