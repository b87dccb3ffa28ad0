"""Engines: the growing one against the one with a fixed cache, whose step a CUDA graph captures."""

from __future__ import annotations

import pytest
import torch

from lbq.formats.errors import UsageError
from lbq.runtime.binding import bind
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import CudaEngine, _bucket

IDS = [int(i) for i in torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(4))]


@pytest.fixture(scope="module")
def decoder(tiny, reference_kernels):
    return bind(tiny.weights, reference_kernels).decoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
def test_engine_of_the_gpu_without_graphs_agrees(decoder, dtype, tolerance):
    eager, device = DecoderEngine(decoder, 200), CudaEngine(decoder, 200, cache_dtype=dtype, graphs=False)
    for engine in (eager, device):
        engine.prefill(IDS)
        engine.truncate(20)
    assert device.position == 20
    for token in IDS[20:]:
        expected, got = eager.decode(token), device.decode(token)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert eager.position == device.position == 30


def test_logits_of_a_prompt(decoder):
    every = DecoderEngine(decoder, 64).all_logits(IDS)
    assert every.shape == (30, 97)
    torch.testing.assert_close(DecoderEngine(decoder, 64).prefill(IDS), every[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no tokens"), ([0, 97], "token id 97"), ([-1], "token id -1"), ([0] * 33, "context of 32")],
)
def test_prompts_that_do_not_fit(decoder, ids, message):
    engine = DecoderEngine(decoder, 32)
    with pytest.raises(UsageError, match=message):
        engine.prefill(ids)
    assert engine.position == 0
    engine.prefill(IDS)
    with pytest.raises(UsageError, match=r"30 \+ 3 tokens"):
        engine.prefill([1, 2, 3])


def test_buckets():
    assert [_bucket(i, 1280) for i in (0, 255, 256, 511, 512, 1024, 1279)] == [256, 256, 512, 512, 1024, 1280, 1280]
