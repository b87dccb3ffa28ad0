"""What is said of kernels is what binding and the engines choose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lbq.formats.manifest import QuantizedModule
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice, CudaDevice
from lbq.runtime.explain import explain
from lbq.runtime.kernels import gpu
from lbq.runtime.kernels.gpu import Gpu
from lbq.runtime.needs import needs

GPU = CudaDevice(exact=False)
UNFUSED = CudaDevice(exact=False, fused=False)


def entries(weights):
    """The manifest's entries of tiny weights."""
    return {name: QuantizedModule(w.n, w.k, w.bits, w.group) for name, w in weights.quantized.items()}


def explained(weights, device):
    return explain(weights.spec, needs(weights.spec, entries(weights), device).units, device)


def pretend(monkeypatch, sms, capability=(9, 0)):
    """Let torch say that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Pretend")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=sms))
    found = Gpu("Pretend", capability, sms)
    monkeypatch.setattr(gpu, "_described", lambda device: found if device.type == "cuda" else None)


def make_dense(tiny, name):
    weight = tiny.weights.quantized.pop(name)
    tiny.weights.tensors[f"{name}.weight"] = weight.dequantize().to(torch.bfloat16)


def test_on_the_cpu(make_tiny):
    tiny = make_tiny("llama-tied")
    found = explained(tiny.weights, CpuDevice(exact=False))
    assert tuple(each.use for each in found.units) == bind(tiny.weights, CpuDevice(exact=False)).kernels
    assert found.device.startswith("CPU, ")
    assert found.attention.endswith("keys and values in float32")
    eight = explained(tiny.weights, CpuDevice(exact=False, kv_cache="int8"))
    assert eight.attention.endswith("keys and values in int8")
    by_name = {each.use.units: each for each in found.units}
    assert [way.tokens for way in by_name["model.layers.*.mlp.down_proj"].ways] == ["1 – 16", "more"]
    assert [way.how for way in by_name["lm_head"].ways] == [by_name["lm_head"].use.kernel]
    exact = explained(tiny.weights, CpuDevice(exact=True))
    assert all("float32 was asked for" in each.ways[0].why for each in exact.units)


def test_a_gpu_that_is_not_here(make_tiny):
    found = explained(make_tiny("llama3-rope").weights, GPU)
    assert found.device == "a GPU (none is here)"
    assert found.step.startswith("fused")
    assert all("multiprocessors" in each.ways[0].why for each in found.units)
    plain = explained(make_tiny("llama3-rope").weights, UNFUSED)
    assert "without the fused step" in plain.step
    assert [way.tokens for way in plain.units[0].ways] == ["1", "2 – 96", "97 or more"]
    assert "up to 16 texts at a time in one pass over the weights" in found.step
    three = explained(make_tiny("llama3-rope", bits=3).weights, GPU)
    assert [way.tokens for way in three.units[0].ways] == ["1", "2 – 16", "17 or more"]
    assert "several texts by a pass each: model.layers.*.self_attn.{q_proj,k_proj,v_proj} has 3-bit codes" in three.step


def test_how_prompts_attend(make_tiny):
    for dim, said in (
        (64, "a causal kernel of their own"),
        (288, "layer 0: heads of 288: they must be of at most 256"),
    ):
        tiny = make_tiny("llama3-rope", head_dim=dim, num_attention_heads=2, num_key_value_heads=1)
        assert said in explained(tiny.weights, GPU).attention
    assert "asked for without" in explained(tiny.weights, UNFUSED).attention
    assert "prompts" not in explained(tiny.weights, CudaDevice(exact=True)).attention


def test_heads_wider_than_128(make_tiny, monkeypatch):
    weights = make_tiny("llama3-rope", head_dim=256, num_attention_heads=2, num_key_value_heads=1).weights
    assert "64 tokens a program" in explained(weights, GPU).attention
    assert "(int4 takes 144 kB of shared memory a program)" in explained(weights, GPU).attention
    pretend(monkeypatch, 28, (8, 6))
    assert "(not in int4: heads of 256 take 144 kB of shared memory" in explained(weights, GPU).attention
    narrow = explained(make_tiny("llama3-rope").weights, GPU).attention
    assert "128 tokens a program" in narrow
    assert "int4" not in narrow


def test_tiles_of_a_gpu(make_tiny, monkeypatch):
    pretend(monkeypatch, 132)
    found = explained(make_tiny("llama3-rope", hidden_size=2048).weights, GPU)
    assert found.device == "Pretend, 132 multiprocessors"
    assert "PDL" in found.step
    head = next(each for each in found.units if each.use.units == "lm_head")
    assert [way.tokens for way in head.ways] == ["1", "2 – 96", "97 or more"]
    assert "on 2 warps" in head.ways[0].how  # 97 rows of 512 words
    assert "share a row of 512 words" in head.ways[0].why
    assert "tensor cores" in head.ways[1].how
    assert "a few tokens a program up to" in found.step + str(found)
    pretend(monkeypatch, 30, (8, 6))
    assert "PDL" not in explained(make_tiny("llama3-rope", hidden_size=2048).weights, GPU).step


def test_why_a_step_is_not_fused(make_tiny):
    tiny = make_tiny("llama3-rope")
    make_dense(tiny, "model.layers.1.mlp.down_proj")
    found = explained(tiny.weights, GPU)
    assert "down_proj stays in 16 bits" in found.step
    odd = make_tiny("llama3-rope", head_dim=16, num_attention_heads=2, num_key_value_heads=2)
    assert "heads of 16, 1 to a key's: they are no whole blocks of 32" in explained(odd.weights, GPU).step


@pytest.mark.gpu
@pytest.mark.parametrize("changed", ["nothing", "a dense layer", "odd heads"])
def test_what_is_said_is_what_runs(make_tiny, monkeypatch, changed):
    from lbq.runtime.bench.weights import DeviceKernels
    from lbq.runtime.fused.engine import default_plan
    from lbq.runtime.fused.step import FusedStep, why_not
    from lbq.runtime.kernels.gemv.triton import INTERPRETED

    odd = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2} if changed == "odd heads" else {}
    tiny = make_tiny("qwen3-qk-norm", num_hidden_layers=1, **odd)
    if changed == "a dense layer":
        make_dense(tiny, "model.layers.0.mlp.down_proj")
    decoder = bind(tiny.weights, DeviceKernels(torch.device("cpu" if INTERPRETED else "cuda"))).decoder
    if INTERPRETED:
        pretend(monkeypatch, 1)
    found = explained(tiny.weights, GPU)
    assert found.step.startswith("fused") == (why_not(decoder) is None)
    if why_not(decoder) is not None:
        return
    step = FusedStep(decoder, 16, default_plan(GPU.device))
    roles = ("qkv", "out", "gate_up", "down", "head")
    for role, each in zip(roles, found.units, strict=True):
        tile = step.products(role)[0].how.tile
        assert f"{tile.rows}×{tile.columns} words on {tile.warps} warp" in each.ways[0].how
