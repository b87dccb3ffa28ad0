"""A checkpoint that mlx-lm converted, and layers that MLX dequantised. ``mlx/make.py`` made the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight, pack
from lbq.quantizer.foreign import NoImage, open_foreign
from lbq.quantizer.foreign.coded import unpack_stream
from lbq.quantizer.source import resolve

FOLDER = Path(__file__).parent / "mlx"
LAYER, EMBEDDING = "model.layers.0.self_attn.k_proj", "model.embed_tokens"


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(FOLDER / "config.json", tmp_path)
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    return tmp_path


def configure(folder: Path, settings: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal but for the rounding of one float32 product and sum, which may be fused."""
    return torch.allclose(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 2**-22)


def test_dequantized_as_by_mlx(expected: dict[str, torch.Tensor]) -> None:
    with open_foreign(resolve(FOLDER)) as found:
        assert (found.tool, found.notes, found.spec.tied) == ("MLX", (), True)
        assert found.layers.keys() == {p.name for p in found.spec.projections()} - {"lm_head"} | {EMBEDDING}
        assert close(found.dense(f"{LAYER}.weight"), expected[f"4.{LAYER}"])
        assert close(found.dense(f"{EMBEDDING}.weight")[:16], expected[f"4.{EMBEDDING}"])
        assert found.image(LAYER) == NoImage("asymmetric: zero points differ from the middle")
        assert found.nbytes("lm_head") == found.nbytes(EMBEDDING) == 128 * (64 // 2 + 2 * 2 * 2)
        found.release_dense(f"{EMBEDDING}.weight")
        assert close(found.dense(f"{EMBEDDING}.weight")[:16], expected[f"4.{EMBEDDING}"])


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (8, 64)])
def test_a_layer_of_other_bits(copy: Path, expected: dict[str, torch.Tensor], bits: int, group: int) -> None:
    tensors = load_file(copy / "model.safetensors")
    for part in ("weight", "scales", "biases"):
        tensors[f"{LAYER}.{part}"] = expected[f"{bits}.{LAYER}.{part}"]
    save_file(tensors, copy / "model.safetensors")
    configure(copy, {"bits": 4, "group_size": 32, LAYER: {"bits": bits, "group_size": group}, "lm_head": False})
    with open_foreign(resolve(copy)) as found:
        assert close(found.dense(f"{LAYER}.weight"), expected[f"{bits}.{LAYER}"])


def test_symmetric_biases_have_an_exact_image(copy: Path) -> None:
    """As AutoRound exports symmetric layers to MLX."""
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{LAYER}.biases"] = -8 * tensors[f"{LAYER}.scales"]
    save_file(tensors, copy / "model.safetensors")
    with open_foreign(resolve(copy)) as found:
        image = found.image(LAYER)
        assert isinstance(image, PackedWeight)
        assert torch.equal(image.dequantize(), found.dense(f"{LAYER}.weight"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mxfp4"),
        ({"bits": 6, "group_size": 32}, "bits"),
        ({"bits": 4}, "group_size"),
        ({"bits": 4, "group_size": -5}, "group size -5"),
        ({"bits": 4, "group_size": 64}, "fit none of the settings"),
        ({"bits": 4, "group_size": 32, "a": {"bits": 4}}, "group_size"),
        ({"quant_method": "mlx", "bits": 4, "group_size": 32}, "'mlx' is not supported"),
    ],
)
def test_configs_that_lbq_does_not_read(copy: Path, settings: dict[str, object], says: str) -> None:
    configure(copy, settings)
    with pytest.raises(DataError, match=says):
        open_foreign(resolve(copy))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_streams(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 96), dtype=torch.uint8)
    words = pack(codes, bits) if bits != 2 else (codes.view(3, 6, 16).int() << (2 * torch.arange(16))).sum(2).int()
    assert torch.equal(unpack_stream(words, bits, 96), codes)
