"""Quantised when it is used: the same codes and scales as a conversion writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lbq.formats.artifact import open_artifact
from lbq.quantizer.convert import write_artifact
from lbq.quantizer.on_load import QuantizedOnLoad
from lbq.quantizer.prepare import prepare
from lbq.quantizer.request import make_request
from lbq.quantizer.source import resolve


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_same_as_artifact(checkpoints: Mapping[str, Path], tmp_path: Path, family: str) -> None:
    request = make_request(3, 64, overrides=("down_proj=8",), keep=("layers.0.mlp.gate_proj",), readers=("vllm",))
    prepared = prepare(resolve(checkpoints[family]), request)
    written = write_artifact(prepared, tmp_path / "written").path
    weights = QuantizedOnLoad(prepare(resolve(checkpoints[family]), request), torch.device("cpu"))
    with open_artifact(written) as artifact, weights:
        assert weights.spec == artifact.spec
        for projection in artifact.spec.projections():
            name = projection.name
            assert weights.is_quantized(name) == artifact.is_quantized(name)
            if artifact.is_quantized(name):
                mine, stored = weights.packed(name), artifact.packed(name)
                assert (mine.bits, mine.group) == (stored.bits, stored.group)
                assert torch.equal(mine.words, stored.words)
                assert torch.equal(mine.scales, stored.scales)
                weights.release(name)
        for name in artifact.manifest.dense:
            assert torch.equal(weights.dense(name), artifact.dense(name))
            weights.release_dense(name)
