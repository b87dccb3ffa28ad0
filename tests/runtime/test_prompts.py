"""A prompt's own layers against float32, on a tiny model of every family; see kernels/test_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from tiny_steps import DEVICE, SMALL, Kernels, divergence, token_ids

from lbq.runtime import prompts
from lbq.runtime.binding import bind
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import CudaDevice
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.prompts import PromptLayers, why_not

pytestmark = pytest.mark.gpu

IDS = torch.tensor(token_ids(11 if INTERPRETED else 40, 8))
SHAPE = {**SMALL, "num_hidden_layers": 1 if INTERPRETED else 3}


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Few tokens count as many, and a prompt has several chunks."""
    monkeypatch.setattr(prompts, "BATCH_TOKENS", 4)
    monkeypatch.setattr(PromptLayers, "chunk", 17)  # on a GPU; one under the interpreter, but for one test


def through(decoder: Decoder, ids: torch.Tensor, *, all_logits: bool, dtype: torch.dtype = torch.float16):
    """Logits, and the state, of ids that went through a prompt's own layers."""
    state = decoder.new_state(64, dtype=dtype, fixed=True)
    return decoder.forward(ids.to(DEVICE), state, all_logits=all_logits, layers=PromptLayers(decoder)), state


def test_every_family(tiny, make_tiny, reference_kernels):
    tiny = make_tiny(tiny.family, **SHAPE)
    reference = bind(tiny.weights, reference_kernels).decoder
    state = reference.new_state(64, fixed=True)
    expected = reference.forward(IDS, state, all_logits=True)
    decoder = bind(tiny.weights, Kernels()).decoder
    assert why_not(decoder) is None
    every, held = through(decoder, IDS, all_logits=True)
    assert divergence(expected, every).max() <= 1e-4
    assert held.length == len(IDS)
    # Weights, tokens and what is kept are rounded to float16, each by 2e-4 of its size in the mean square: 3.5e-4
    # together in the first layer. The second reads what attention and three products more have rounded, 1.2e-3 measured
    # in every family, the third 1.7e-3. One element of thousands is off by several standard deviations.
    for layer, other, bound in zip(held.layers, state.layers, (5e-4, 2e-3, 3e-3), strict=False):
        off = (layer.kv.double().cpu() - other.kv).abs()
        assert off.norm() <= bound * other.kv.double().norm()
        assert off.max() <= 2 * bound * other.kv.abs().max()


def test_the_last_token_alone_and_chunks(make_tiny, monkeypatch):
    monkeypatch.setattr(PromptLayers, "chunk", 6)
    decoder = bind(make_tiny("qwen2-some-windows", **SMALL).weights, Kernels()).decoder
    every, full = through(decoder, IDS, all_logits=True)
    last, held = through(decoder, IDS, all_logits=False)
    assert divergence(every[-1], last).max() <= 1e-4  # the last token alone is multiplied as a decode step's is
    for layer, other in zip(held.layers, full.layers, strict=True):
        assert torch.equal(layer.kv, other.kv)


def test_dense_layers(make_tiny, reference_kernels):
    tiny = make_tiny("llama3-rope", **SHAPE)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weight = tiny.weights.quantized.pop(f"model.layers.0.{name}")
        tiny.weights.tensors[f"model.layers.0.{name}.weight"] = weight.dequantize().to(torch.bfloat16)
    expected = DecoderEngine(bind(tiny.weights, reference_kernels).decoder, 64).all_logits(IDS.tolist())
    got, _ = through(bind(tiny.weights, Kernels()).decoder, IDS, all_logits=True)
    assert divergence(expected, got).max() <= 1e-4


def test_int8_caches(make_tiny, reference_kernels):
    """As the decoder itself takes a prompt in, on such a cache."""
    tiny = make_tiny("qwen3-qk-norm", **SHAPE)
    reference = bind(tiny.weights, reference_kernels).decoder
    state = reference.new_state(64, dtype=torch.int8, fixed=True)
    expected = reference.forward(IDS, state, all_logits=True)
    got, held = through(bind(tiny.weights, Kernels()).decoder, IDS, all_logits=True, dtype=torch.int8)
    assert divergence(expected, got).max() <= 1e-3
    torch.testing.assert_close(held.layers[0].scales.cpu(), state.layers[0].scales, rtol=2e-3, atol=1e-6)
    assert int((held.layers[0].kv.cpu().int() - state.layers[0].kv.int()).abs().max()) <= 1


def test_what_it_does_not_know(make_tiny, reference_kernels):
    model = make_tiny("llama-tied", **SMALL)
    assert "layer 0 runs by reference INT4" in why_not(bind(model.weights, reference_kernels).decoder)
    assert "float32 matmul" in why_not(bind(model.weights, Kernels(exact=True)).decoder)
    decoder = bind(model.weights, Kernels()).decoder
    decoder.layers[1].mixer = object()
    assert why_not(decoder) == "layer 1 mixes tokens by object"


@pytest.mark.skipif(INTERPRETED, reason="there an engine's device is a CPU")
def test_engines_use_them(make_tiny):
    tiny = make_tiny("llama-tied", **SMALL)
    decoder = bind(tiny.weights, Kernels()).decoder
    engine = CudaDevice(exact=False).engine(decoder, 64)
    assert isinstance(engine._layers, PromptLayers)
    ids = IDS.tolist()
    assert torch.equal(engine.all_logits(ids), through(decoder, IDS, all_logits=True)[0])
    exact = bind(tiny.weights, Kernels(exact=True)).decoder
    assert CudaDevice(exact=True).engine(exact, 64)._layers is None
    assert CudaDevice(exact=False, fused=False).engine(decoder, 64)._layers is None
