"""Hugging Face families: ``config.json`` to model spec. No other module knows about families."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lbq.formats import json_file
from lbq.formats.errors import DataError
from lbq.quantizer.families.llama import ARCHITECTURES, Adapted, adapt

__all__ = ["Adapted", "read_spec", "supported"]


class _Head(msgspec.Struct):
    architectures: list[str] | None = None
    quantization_config: dict[str, object] | None = None


def supported() -> tuple[str, ...]:
    """Architecture names that can be converted."""
    return tuple(sorted(ARCHITECTURES))


def read_spec(folder: Path) -> Adapted:
    """The spec of the checkpoint in ``folder`` and the config keys that were not understood.

    Raises DataError for a missing or malformed config, an architecture that is not supported, a value without a
    meaning here, or a checkpoint that is quantized already.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{folder}: no config.json: this is not a Hugging Face checkpoint")
    data = json_file.read_bytes(path)
    head = json_file.decode(data, _Head, path)
    names = head.architectures or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        what = ", ".join(names) or "none named"
        raise DataError(f"{path}: architecture {what} is not supported; supported are {', '.join(supported())}")
    if head.quantization_config:
        method = head.quantization_config.get("quant_method", "unknown")
        raise DataError(f"{path}: the checkpoint is already quantized ({method}); convert the original BF16 weights")
    try:
        return adapt(names[0], data, path)
    except ValueError as error:  # the spec's own checks
        raise DataError(f"{path}: {error}") from None
