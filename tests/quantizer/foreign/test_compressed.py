"""Checkpoints that compressed-tensors wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from lbq.formats.packing import PackedWeight
from lbq.quantizer.foreign import NoImage, open_foreign
from lbq.quantizer.source import resolve

Tensors = dict[str, torch.Tensor]
Compress = Callable[..., tuple[Path, Mapping[str, torch.Tensor]]]


@pytest.fixture
def compress(checkpoints: Mapping[str, Path], tmp_path: Path) -> Compress:
    """``compress(scale_dtype=…, **QuantizationArgs)``: the Llama checkpoint, and its weights as they decompress."""

    def run(scale_dtype: torch.dtype = torch.bfloat16, **settings: object) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / "compressed"
        folder.mkdir()
        for path in checkpoints["llama"].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        args = QuantizationArgs(type="int", dynamic=False, **settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        tensors, weights = load_file(folder / "model.safetensors"), {}
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            module = name.removesuffix(".weight")
            state = parameters(tensors.pop(name), args, scale_dtype)
            stored = PackedQuantizationCompressor.compress(state, scheme)
            tensors |= {f"{module}.{key}": value for key, value in stored.items()}
            stored["weight_scale"] = stored["weight_scale"].float()  # else products are rounded to its dtype
            weights[module] = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**json.loads(scheme.model_dump_json()), "format": "pack-quantized"}},
            "ignore": ["lm_head"],
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder, weights

    return run


def parameters(weight: torch.Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> Tensors:
    """A weight with the scales and zero points of its groups' ranges."""
    from compressed_tensors.quantization.utils import calculate_qparams

    group = args.group_size if args.strategy == "group" else weight.shape[1]
    grouped = weight.float().unflatten(1, (-1, group))
    scale, zero_point = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
    return {"weight": weight, "weight_scale": scale.to(scale_dtype), "weight_zero_point": zero_point.to(torch.int8)}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, None])
def test_symmetric_integers_have_an_exact_image(compress: Compress, bits: int, group: int | None) -> None:
    strategy = "group" if group else "channel"
    folder, weights = compress(num_bits=bits, group_size=group, strategy=strategy)
    with open_foreign(resolve(folder)) as found:
        assert (found.tool, found.notes) == ("compressed-tensors", ())
        assert found.layers.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(found.dense(f"{name}.weight"), weight)
            image = found.image(name)
            assert isinstance(image, PackedWeight)
            assert torch.equal(image.dequantize(), weight)
            assert image.group == (group or image.k)
            assert found.nbytes(name) == image.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, None])
def test_zero_points(compress: Compress, bits: int, group: int | None) -> None:
    strategy = "group" if group else "channel"
    folder, weights = compress(num_bits=bits, group_size=group, strategy=strategy, symmetric=False)
    with open_foreign(resolve(folder)) as found:
        for name, weight in weights.items():
            assert torch.equal(found.dense(f"{name}.weight"), weight)
            assert isinstance(found.image(name), NoImage)


def test_scales_that_bf16_does_not_hold(compress: Compress) -> None:
    folder, weights = compress(torch.float16, num_bits=4, group_size=32, strategy="group")
    with open_foreign(resolve(folder)) as found:
        for name, weight in weights.items():
            assert torch.equal(found.dense(f"{name}.weight"), weight)
            assert found.image(name) == NoImage("float16 scales that BF16 does not hold")


def test_an_artifact_is_such_a_checkpoint(kept_artifact: Path) -> None:
    from lbq.formats.artifact import open_artifact

    with open_foreign(resolve(kept_artifact)) as found, open_artifact(kept_artifact) as artifact:
        assert found.spec == artifact.spec
        assert found.layers.keys() == artifact.manifest.quantized.keys()
        for name in found.layers:
            image = found.image(name)
            assert isinstance(image, PackedWeight)
            assert torch.equal(image.words, artifact.packed(name).words)
            assert torch.equal(image.scales, artifact.packed(name).scales)


def test_groups_that_gptq_reordered(compress: Compress, resave: Callable[..., None]) -> None:
    """``weight_g_idx``, as versions before 0.19 wrote it; the package itself no longer does."""
    folder, _ = compress(num_bits=4, group_size=32, strategy="group")
    name = "model.layers.0.mlp.down_proj"
    groups = (torch.randperm(96, generator=torch.Generator().manual_seed(3)) // 32).int()
    resave(folder, lambda tensors: tensors.update({f"{name}.weight_g_idx": groups}))
    with open_foreign(resolve(folder)) as found:
        coded = found.coded(name)
        expected = (coded.codes.float() - 8) * coded.scales.float()[:, groups.long()]
        assert torch.equal(found.dense(f"{name}.weight"), expected)
        assert found.image(name) == NoImage("act-order: groups are not of neighbours")


def test_3_bits_as_versions_before_0_18_packed_them(compress: Compress, resave: Callable[..., None]) -> None:
    """Ten codes a word, as the source of 0.17 has it; the package itself can no longer write them."""
    folder, weights = compress(num_bits=3, group_size=32, strategy="group")
    with open_foreign(resolve(folder)) as found:
        codes = {name: found.coded(name).codes for name in weights}

    def repack(tensors: Tensors) -> None:
        for name, code in codes.items():
            padded = torch.nn.functional.pad(code.int(), (0, -code.shape[1] % 10)).unflatten(1, (-1, 10))
            tensors[f"{name}.weight_packed"] = (padded << (3 * torch.arange(10, dtype=torch.int32))).sum(2).int()

    resave(folder, repack)
    with open_foreign(resolve(folder)) as found:
        for name, weight in weights.items():
            assert torch.equal(found.dense(f"{name}.weight"), weight)
