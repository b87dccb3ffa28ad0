"""The decoder on a CUDA device: attention against float64, the graph engine against the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_steps import divergence, token_ids

from lbq.runtime import engine_cuda
from lbq.runtime.attention import attend
from lbq.runtime.binding import bind
from lbq.runtime.cache import KVCache
from lbq.runtime.devices import CudaDevice
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import CudaEngine
from lbq.runtime.step import DeviceStep, HostStep

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, LENGTH, START = 8, 2, 64, 300, 111
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def float64_attention(q, kv, window):
    """All positions at once: q [S, heads, dim], kv [S, 2 · kv_heads, dim]."""
    k, v = kv.double().repeat_interleave(HEADS // KV_HEADS, dim=1).chunk(2, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / math.sqrt(DIM)
    distance = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
    hidden = (distance < 0) | (distance >= (window or len(q)))
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention(dtype, window):
    device = torch.device("cuda")
    q = torch.randn(LENGTH, HEADS, DIM, device=device)
    kv = torch.randn(LENGTH, 2 * KV_HEADS, DIM, device=device)
    expected = float64_attention(q, kv, window)
    cache = KVCache(KV_HEADS, DIM, 512, dtype=dtype, device=device, fixed=True)
    pieces = []
    for start, stop in ((0, START), (START, LENGTH - 1)):  # causal, then with a mask
        seen = HostStep(start, stop - start, device).store(cache, kv[start:stop], window)
        pieces.append(attend(q[start:stop], seen, DIM**-0.5))
    step = DeviceStep(torch.tensor([LENGTH - 1], device=device), torch.arange(512, device=device))
    pieces.append(attend(q[-1:], step.store(cache, kv[-1:], window), DIM**-0.5))
    torch.testing.assert_close(torch.cat(pieces).double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("exact", [True, False])
def test_graphs_give_the_logits_of_the_cpu(tiny, reference_kernels, exact, monkeypatch):
    monkeypatch.setattr(engine_cuda, "BUCKET", 16)  # several graphs within a short text
    ids = token_ids(70, 6)
    host = DecoderEngine(bind(tiny.weights, reference_kernels).decoder, 128)
    decoder = bind(tiny.weights, CudaDevice(exact)).decoder
    device = CudaEngine(decoder, 100, cache_dtype=torch.float32 if exact else torch.float16)
    for engine in (host, device):
        engine.prefill(ids[:50])
        engine.truncate(10)
    worst = 0.0
    for token in ids[10:]:
        worst = max(worst, float(divergence(host.decode(token), device.decode(token))))
    assert worst <= (1e-9 if exact else 1e-4)
    assert sorted(device._graphs) == [16, 32, 64, 112]


def test_prompts(tiny, reference_kernels):
    ids = token_ids(120, 7)
    expected = DecoderEngine(bind(tiny.weights, reference_kernels).decoder, 128).all_logits(ids)
    decoder = bind(tiny.weights, CudaDevice(exact=False)).decoder
    assert divergence(expected, CudaEngine(decoder, 128).all_logits(ids)).max() <= 1e-3
