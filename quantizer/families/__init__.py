"""Hugging Face families: ``config.json`` to model spec. No other module knows about families."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lbq.formats import json_file
from lbq.formats.disk import shown
from lbq.formats.errors import DataError
from lbq.formats.manifest import MANIFEST
from lbq.formats.spec import ModelSpec
from lbq.quantizer.families.llama import ARCHITECTURES, Adapted, adapt

__all__ = ["Adapted", "read_quantized", "read_spec", "spec_of", "supported"]


# Methods whose checkpoints can be imported (lbq.quantizer.foreign); MLX names none.
FOREIGN = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",  # before 0.4
    None: "MLX",
}


class _Head(msgspec.Struct):
    architectures: list[str] | None = None
    quantization_config: dict[str, object] | None = None


class _Quantization(msgspec.Struct):
    quantization_config: msgspec.Raw = msgspec.Raw(b"null")


def supported() -> tuple[str, ...]:
    """Architecture names that can be converted."""
    return tuple(sorted(ARCHITECTURES))


def read_spec(folder: Path) -> Adapted:
    """The spec of the checkpoint in ``folder`` and the config keys that were not understood.

    Raises DataError for a missing or malformed config, an architecture that is not supported, a value without a
    meaning here, or a checkpoint that is quantized already.
    """
    path, data, head = _read(folder)
    if head.quantization_config:
        raise DataError(f"{path}: {_quantized_already(folder, head.quantization_config)}")
    return _adapt(path, data, head)


def read_quantized(folder: Path) -> tuple[Adapted, bytes | None]:
    """:func:`read_spec` for what may be quantized already, and the JSON of its ``quantization_config`` if it is."""
    path, data, head = _read(folder)
    adapted = _adapt(path, data, head)
    settings = bytes(json_file.decode(data, _Quantization, path).quantization_config)
    return adapted, settings if head.quantization_config else None


def spec_of(data: bytes, path: Path) -> ModelSpec:
    """The spec that the JSON of a ``config.json`` describes, which ``path`` is said to hold. Raises DataError."""
    return _adapt(path, data, _head(path, data)).spec


def _quantized_already(folder: Path, settings: dict[str, object]) -> str:
    """What there is to say to somebody who wants to convert such a checkpoint."""
    original = "convert the original BF16 weights"
    if (folder / MANIFEST).is_file():
        return f"an lbq artifact, quantized already; {original}"
    method = settings.get("quant_method")
    name = FOREIGN.get(method) if method is None or isinstance(method, str) else None
    if name is None:
        return f"the checkpoint is already quantized ({shown(str(method))}); {original}"
    return f"the checkpoint is already quantized ({name}): lbq import makes an artifact of it; or {original}"


def _read(folder: Path) -> tuple[Path, bytes, _Head]:
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{folder}: no config.json: this is not a Hugging Face checkpoint")
    data = json_file.read_bytes(path)
    return path, data, _head(path, data)


def _head(path: Path, data: bytes) -> _Head:
    head = json_file.decode(data, _Head, path)
    names = head.architectures or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        what = ", ".join(names) or "none named"
        raise DataError(f"{path}: architecture {what} is not supported; supported are {', '.join(supported())}")
    return head


def _adapt(path: Path, data: bytes, head: _Head) -> Adapted:
    assert head.architectures is not None
    try:
        return adapt(head.architectures[0], data, path)
    except ValueError as error:  # the spec's own checks
        raise DataError(f"{path}: {error}") from None
