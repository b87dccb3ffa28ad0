"""What a server's loader made of an artifact, against what the artifact holds: whole, or a rank's part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.packing import PackedWeight

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 288,
}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROW_PARALLEL = ("o_proj", "down_proj")


def check_weights(model: torch.nn.Module, folder: Path, ranks: int, rank: int) -> None:
    """Every layer of a server's model has the scheme of the manifest and this rank's weights."""
    with open_artifact(folder) as artifact:
        seen = set()
        for name, layer in model.named_modules():
            parent, _, leaf = name.rpartition(".")
            if leaf not in (*PARTS, *ROW_PARALLEL, "lm_head"):
                continue
            parts = [f"{parent}.{part}".removeprefix(".") for part in PARTS.get(leaf, (leaf,))]
            entry = artifact.manifest.quantized.get(parts[0])
            assert hasattr(layer, "weight_packed") == (entry is not None), name
            if entry is not None:
                assert (bits_of(layer), layer.scheme.group_size) == (entry.bits, entry.scheme.group or -1), name
                seen |= set(parts)
            found = standing_for(layer)
            if leaf == "lm_head":  # rows are padded, and the last rank has fewer of them
                per = found.shape[0]
                wanted = share(artifact, parts, 1, 0)[rank * per : (rank + 1) * per]
                found = found[: len(wanted)]
            else:
                wanted = share(artifact, parts, ranks, rank)
            assert torch.equal(found, wanted), name
        assert seen == set(artifact.manifest.quantized)


def share(artifact: Artifact, parts: list[str], ranks: int, rank: int) -> torch.Tensor:
    """A rank's part of what a (fused) layer stands for."""
    found = []
    for module in parts:
        quantized, heads = artifact.is_quantized(module), artifact.spec.layer(0).mixer.kv_heads
        weight = artifact.packed(module).dequantize() if quantized else artifact.dense(f"{module}.weight").float()
        pieces, piece = ranks, rank
        if module.endswith(("k_proj", "v_proj")) and heads < ranks:  # of which several ranks have the same
            pieces, piece = heads, rank * heads // ranks
        found.append(weight.chunk(pieces, dim=int(module.endswith(ROW_PARALLEL)))[piece])
    return torch.cat(found)


def bits_of(layer: Any) -> int:
    return int(32 / layer.scheme.pack_factor)


def standing_for(layer: Any) -> torch.Tensor:
    """What a layer's parameters stand for, float32."""
    if not hasattr(layer, "weight_packed"):
        weight: torch.Tensor = layer.weight.detach().float()
        return weight
    words, scales, bits = layer.weight_packed.detach(), layer.weight_scale.detach(), bits_of(layer)
    k = getattr(layer, "input_size_per_partition", words.shape[1] * 32 // bits)
    assert scales.dtype == torch.bfloat16
    return PackedWeight(words, scales, bits, k // scales.shape[1], k).dequantize()
