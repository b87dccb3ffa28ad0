"""Binding: what is fused, what is refused, what is released and what is reported."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import pytest
import torch

from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.runtime import binding
from lbq.runtime.binding import KernelUse, bind
from lbq.runtime.kernels.linear import Matrix
from lbq.runtime.upload import Staging

CPU = torch.device("cpu")


@dataclass
class Seen:
    """A linear that remembers what it was made of and holds ``resident_bytes``."""

    weight: PackedWeight | torch.Tensor
    bias: torch.Tensor | None
    kernel: str
    resident_bytes: int
    fallback: str | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass
class Recorder:
    """Kernels that compute nothing."""

    resident: int = 0
    made: list[Seen] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def packed(self, weight, bias):
        self.made.append(Seen(weight, bias, f"INT{weight.bits}", self.resident))
        return self.made[-1]

    def dense(self, weight, bias):
        self.made.append(Seen(weight, bias, "BF16", self.resident, "nobody asked"))
        return self.made[-1]


def test_units_are_joined_in_the_order_of_the_spec(make_tiny):
    tiny = make_tiny("qwen2-some-windows")
    kernels = Recorder()
    bind(tiny.weights, kernels)
    qkv = kernels.made[0]
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    parts = [tiny.weights.packed(name).dequantize() for name in names]
    assert torch.equal(qkv.weight.dequantize(), torch.cat(parts))
    assert qkv.bias.dtype == torch.float32
    assert torch.equal(qkv.bias, torch.cat([tiny.weights.dense(f"{name}.bias").float() for name in names]))
    assert len(kernels.made) == 4 * 3 + 1


def test_kernel_uses_are_grouped_by_unit_and_kernel(make_tiny):
    tiny = make_tiny("llama-tied")
    weight = tiny.weights.quantized.pop("model.layers.1.mlp.down_proj")
    tiny.weights.tensors["model.layers.1.mlp.down_proj.weight"] = weight.dequantize().to(torch.bfloat16)
    uses = bind(tiny.weights, Recorder()).kernels
    assert set(uses) == {
        KernelUse("model.layers.*.self_attn.{q_proj,k_proj,v_proj}", Matrix(320, 96, 4, 32), "INT4", None, 3),
        KernelUse("model.layers.*.self_attn.o_proj", Matrix(96, 192, 4, 32), "INT4", None, 3),
        KernelUse("model.layers.*.mlp.{gate_proj,up_proj}", Matrix(320, 96, 4, 32), "INT4", None, 3),
        KernelUse("model.layers.*.mlp.down_proj", Matrix(96, 160, 4, 32), "INT4", None, 2),
        KernelUse("model.layers.*.mlp.down_proj", Matrix(96, 160, 16, 160), "BF16", "nobody asked", 1),
        KernelUse("lm_head", Matrix(97, 96, 16, 96), "BF16", "nobody asked", 1),
    }


def test_tied_head_is_the_embedding_itself(make_tiny):
    tiny = make_tiny("llama-tied")
    kernels = Recorder()
    bind(tiny.weights, kernels)
    assert kernels.made[-1].weight is tiny.weights.dense("model.embed_tokens.weight")


def test_what_was_copied_is_released_and_counted(make_tiny):
    tiny = make_tiny("llama3-rope")
    joined = [f"model.layers.{i}.{x}" for i in range(3) for x in ("self_attn.q_proj", "mlp.up_proj")]
    alone = [f"model.layers.{i}.{x}" for i in range(3) for x in ("self_attn.o_proj", "mlp.down_proj")]
    bound = bind(tiny.weights, Recorder())
    assert set(joined) <= set(tiny.weights.released)
    assert not {*alone, "lm_head"} & set(tiny.weights.released)  # still used where they are mapped
    fused = [
        w.nbytes for name, w in tiny.weights.quantized.items() if not name.endswith(("o_proj", "down_proj", "head"))
    ]
    assert bound.resident_bytes == sum(fused)
    tiny.weights.released.clear()
    bound = bind(tiny.weights, Recorder(resident=1000))
    assert {*joined, *alone, "lm_head"} <= set(tiny.weights.released)
    assert bound.resident_bytes == 13 * 1000


class AtOnce:
    """What stands for a link to a GPU."""

    def buffer(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, buffer):
        pass

    def copy(self, target, source):
        target.copy_(source)

    def done(self):
        return self

    def synchronize(self):
        pass

    def close(self):
        pass


@dataclass
class Copier(Recorder):
    """Kernels that copy their weights as soon as they are made."""

    where: torch.device = CPU

    @property
    def device(self) -> torch.device:
        return self.where

    def packed(self, weight, bias):
        return super().packed(replace(weight, words=weight.words.clone(), scales=weight.scales.clone()), bias)

    def dense(self, weight, bias):
        return super().dense(weight.clone(), bias)


@pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(torch.device("cuda"), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_what_moves_is_there_when_kernels_are_made_of_it(make_tiny, monkeypatch, device):
    def ring(where):
        return Staging(where, chunk=1000, slots=3, link=AtOnce() if where.type == "cpu" else None)

    tiny = make_tiny("qwen2-some-windows")
    layers = tiny.weights.spec.layers
    expected = Recorder()
    plain = bind(tiny.weights, expected)
    monkeypatch.setattr(binding, "mover", ring)
    tiny.weights.released.clear()
    kernels = Copier(where=device)
    bound = bind(tiny.weights, kernels)
    assert {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"} <= set(tiny.weights.released)
    assert len(tiny.weights.released) == len(set(tiny.weights.released))
    assert len(bound.decoder.layers) == len(layers)
    for found, wanted in zip(kernels.made, expected.made, strict=True):
        if isinstance(wanted.weight, PackedWeight):
            assert torch.equal(found.weight.words.cpu(), wanted.weight.words)
            assert torch.equal(found.weight.scales.cpu(), wanted.weight.scales)
        else:
            assert torch.equal(found.weight.cpu(), wanted.weight)
    for found, wanted in zip(bound.decoder.layers, plain.decoder.layers, strict=True):
        assert torch.equal(found.mixer_norm.weight.cpu(), wanted.mixer_norm.weight)


@pytest.mark.parametrize("module", ["self_attn.k_proj", "mlp.up_proj"])
def test_parts_of_a_unit_that_differ_are_refused_before_binding(artifact, resave, reseal, module):
    name, manifest_path = f"model.layers.1.{module}", artifact / "lbq.json"
    with open_artifact(artifact) as opened:
        matrix = opened.packed(name).dequantize().to(torch.bfloat16)

    def make_dense(tensors):
        for part in ("packed", "scale", "shape"):
            del tensors[f"{name}.weight_{part}"]
        tensors[f"{name}.weight"] = matrix

    resave(artifact, make_dense)
    manifest = json.loads(manifest_path.read_text())
    del manifest["quantized"][name]
    manifest["dense"][f"{name}.weight"] = {"shape": list(matrix.shape)}
    names = [file for file in manifest["files"] if not file.startswith("model")]
    manifest["files"] = dict.fromkeys([*names, "model.safetensors"])
    manifest_path.write_text(json.dumps(manifest))
    reseal(artifact)
    with pytest.raises(DataError, match="are fused and differ in bits or group"):
        open_artifact(artifact)
