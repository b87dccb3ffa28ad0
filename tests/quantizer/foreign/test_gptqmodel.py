"""Layers that GPTQModel wrote: act-order, zero points, both versions. ``gptqmodel/make.py`` made the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import Checkpoint, SafetensorsFile
from lbq.quantizer.foreign.coded import Coded, NoImage
from lbq.quantizer.foreign.gptq import parse_gptq

FOLDER = Path(__file__).parent / "gptqmodel"
LAYER = "model.layers.0.self_attn.k_proj"
N, K = 32, 64

REASONS = {
    "v1": "float16 scales that BF16 does not hold",
    "v1-2-bits": "2 bits",
    "v1-8-bits": "float16 scales that BF16 does not hold",
    "v1-act-order": "act-order: groups are not of neighbours",
    "v1-asymmetric-act-order": "asymmetric: zero points differ from the middle",
    "v2": "float16 scales that BF16 does not hold",
    "v2-3-bits-asymmetric": "asymmetric: zero points differ from the middle",
}


def read(name: str) -> tuple[Coded, torch.Tensor]:
    """A layer, and what GPTQModel makes of it."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = file.metadata()["quantization_config"]
    layout = parse_gptq(config.encode(), "config")
    assert layout.notes == ()
    checkpoint = Checkpoint(FOLDER, {path.name: SafetensorsFile(path)})
    stored = layout.locate(checkpoint, LAYER, N, K)
    settled = layout.settle(checkpoint, [stored])
    assert settled == layout
    return settled.read(checkpoint, stored), checkpoint.tensor("dequantized")


def test_every_file_is_read() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == REASONS.keys()


@pytest.mark.parametrize("name", REASONS)
def test_dequantized_as_by_gptqmodel(name: str) -> None:
    coded, expected = read(name)
    assert torch.equal(coded.dequantize(), expected)
    assert coded.image() == NoImage(REASONS[name])


@pytest.mark.parametrize("name", ["v1", "v1-8-bits", "v2"])
def test_exact_image_once_the_scales_are_bf16(name: str) -> None:
    coded, _ = read(name)
    rounded = Coded(coded.codes, coded.scales.bfloat16(), coded.zeros, coded.bits, coded.group, coded.columns)
    image = rounded.image()
    assert isinstance(image, PackedWeight)
    assert torch.equal(image.dequantize(), rounded.dequantize())
