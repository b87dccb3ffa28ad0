"""Checkpoints that AutoRound wrote, in the layouts of GPTQ, AWQ, compressed-tensors and its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbq.formats.packing import PackedWeight
from lbq.quantizer.foreign import ForeignCheckpoint, NoImage, open_foreign
from lbq.quantizer.original import open_original
from lbq.quantizer.source import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package's own

Export = Callable[..., Path]


def opened(folder: Path) -> ForeignCheckpoint:
    return open_foreign(resolve(folder))


def by_autoround(folder: Path, module: str, bits: int, group: int) -> torch.Tensor:
    """A layer's weight, float32 [N, K], as AutoRound's own kernels for the CPU dequantise it."""
    stored = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.")}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scales = tensors["scales"].float()  # it rounds products to the scales' dtype
    if config["quant_method"] == "awq" or "awq" in config.get("packing_format", ""):
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        whole: torch.Tensor = dequantize_gemm(tensors["qweight"], tensors["qzeros"], scales, bits, group)
        return whole.t()
    if config.get("packing_format") == "auto_round:gptqmodel":
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    groups, n = scales.shape
    linear = QuantLinear(bits, group, groups * group, n, bias=False)
    linear.qweight, linear.qzeros, linear.scales = tensors["qweight"], tensors["qzeros"], scales
    result: torch.Tensor = linear(torch.eye(groups * group)).t()
    return result


CASES = [
    ("auto_gptq", 4, True),
    ("auto_gptq", 4, False),
    ("auto_awq", 4, True),
    ("auto_awq", 4, False),
    ("auto_round", 8, True),
    ("auto_round", 3, True),
    ("auto_round:auto_gptq", 3, False),
    ("auto_round:gptqmodel", 4, False),
]


@pytest.mark.parametrize(("form", "bits", "sym"), CASES)
def test_weights_are_those_that_autoround_computes_with(
    export: Export, source: Path, form: str, bits: int, sym: bool
) -> None:
    folder = export(form, bits, sym=sym)
    with opened(folder) as found, open_original(resolve(source)) as original:
        assert found.notes == ()
        assert found.layers.keys() == {p.name for p in found.spec.projections()} - {"lm_head"}
        for name in found.layers:
            weight = found.dense(f"{name}.weight")
            assert torch.equal(weight, by_autoround(folder, name, bits, 32))
            image = found.image(name)
            if sym:  # the scales of BF16 weights happen to be BF16
                assert isinstance(image, PackedWeight)
                assert torch.equal(image.dequantize(), weight)
            else:
                assert image == NoImage("asymmetric: zero points differ from the middle")
        for name, _ in found.spec.norms():
            assert torch.equal(found.dense(f"{name}.weight").float(), original.dense(f"{name}.weight").float())
        assert found.spec == original.spec


def test_compressed_tensors_written_by_autoround(export: Export) -> None:
    folder, other = export("llm_compressor"), export("auto_gptq")
    with opened(folder) as found, opened(other) as gptq:
        assert found.tool == "compressed-tensors"
        for name in found.layers:
            image, same = found.image(name), gptq.image(name)
            assert isinstance(image, PackedWeight)
            assert isinstance(same, PackedWeight)
            assert torch.equal(image.words, same.words)
            assert torch.equal(image.scales, same.scales)


def test_mixed_bits(export: Export) -> None:
    layers = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1}}
    folder = export("auto_round", layer_config=layers)
    with opened(folder) as found:
        settings = {name: str(stored.setting) for name, stored in found.layers.items()}
        assert settings.pop("model.layers.0.mlp.down_proj") == "8 bits a scale a row"
        assert set(settings.values()) == {"4 bits in groups of 32"}
        for name, stored in found.layers.items():
            assert torch.equal(
                found.dense(f"{name}.weight"),
                by_autoround(folder, name, stored.setting.bits, stored.setting.group_in(stored.k)),
            )


@pytest.mark.parametrize(("label", "form"), [("gptq_v2", "auto_gptq"), ("gptq", "auto_round:gptqmodel")])
def test_mislabelled_zero_points_are_caught(export: Export, tmp_path: Path, label: str, form: str) -> None:
    folder = export(form)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": label,
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = "gptq" if label == "gptq_v2" else "gptq_v2"
    with opened(folder) as right, opened(tmp_path) as wrong:
        assert wrong.notes == (f"labelled {label}, but its zero points are those of {other}: read as such",)
        for name in right.layers:
            assert torch.equal(right.dense(f"{name}.weight"), wrong.dense(f"{name}.weight"))
