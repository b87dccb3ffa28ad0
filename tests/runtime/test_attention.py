"""Attention over a cache against a plain float64 formula; slots that were never written must not matter."""

from __future__ import annotations

import math

import pytest
import torch

from lbq.runtime.attention import attend
from lbq.runtime.cache import KVCache
from lbq.runtime.norm import RmsNorm
from lbq.runtime.step import DeviceStep, HostStep
from lbq.runtime.turn import Turn

HEADS, KV_HEADS, DIM, CONTEXT = 6, 2, 16, 64
CPU = torch.device("cpu")


def plain_attention(q, k, v, window):
    """float64 [T, heads, dim] for the last T of S positions; k, v [S, kv_heads, dim]."""
    tokens, length = q.shape[0], k.shape[0]
    out = torch.empty(tokens, HEADS, DIM, dtype=torch.float64)
    for t in range(tokens):
        now = length - tokens + t
        first = 0 if window is None else max(0, now - window + 1)
        for h in range(HEADS):
            keys, values = (x[first : now + 1, h // (HEADS // KV_HEADS)].double() for x in (k, v))
            out[t, h] = torch.softmax(keys @ q[t, h].double() / math.sqrt(DIM), 0) @ values
    return out.view(tokens, -1)


def cache_of(dtype: torch.dtype = torch.float32, *, fixed: bool = False, fill: float = math.nan) -> KVCache:
    cache = KVCache(KV_HEADS, DIM, CONTEXT, dtype=dtype, device=CPU, fixed=fixed)
    cache.kv.fill_(fill)
    return cache


@pytest.mark.parametrize("window", [None, 1, 5, 13, 40])
@pytest.mark.parametrize("split", [(30,), (13, 17), (1, 12, 1, 1, 15)])
def test_attention_in_pieces(window, split):
    q, kv = torch.randn(30, HEADS, DIM), torch.randn(30, 2 * KV_HEADS, DIM)
    cache, start, got = cache_of(), 0, []
    for length in split:
        stop = start + length
        seen = HostStep(start, length, CPU).store(cache, kv[start:stop], window)
        got.append(attend(q[start:stop], seen, DIM**-0.5))
        start = stop
    expected = plain_attention(q, kv[:, :KV_HEADS], kv[:, KV_HEADS:], window)
    torch.testing.assert_close(torch.cat(got).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_attention_with_the_position_in_a_tensor(window, dtype, tolerance):
    q, kv = torch.randn(20, HEADS, DIM), torch.randn(20, 2 * KV_HEADS, DIM)
    cache = cache_of(dtype, fixed=True, fill=1e4)  # what a longer text left behind
    HostStep(0, 19, CPU).store(cache, kv[:19], window)
    seen = DeviceStep(torch.tensor([19]), torch.arange(32)).store(cache, kv[19:], window)
    got = attend(q[19:], seen, DIM**-0.5)
    assert got.dtype == torch.float32
    expected = plain_attention(q[19:], kv[:, :KV_HEADS], kv[:, KV_HEADS:], window)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("split", [(30,), (13, 1, 16)])
def test_int8_keys_and_values(split):
    """Within what a step of 1/127 of a vector's largest element explains, and the same whatever the pieces."""
    q, kv = torch.randn(30, HEADS, DIM), torch.randn(30, 2 * KV_HEADS, DIM)
    turn = Turn.of(torch.randn(KV_HEADS, DIM).exp2())
    cache = KVCache(KV_HEADS, DIM, CONTEXT, dtype=torch.int8, device=CPU, fixed=False, turn=turn)
    start, got = 0, []
    for length in split:
        seen = HostStep(start, length, CPU).store(cache, kv[start : start + length], None)
        got.append(attend(q[start : start + length], seen, DIM**-0.5))
        start += length
    held = torch.cat(cache.held(0, 30)).transpose(0, 1)
    for part, turned in ((slice(0, KV_HEADS), turn.turned), (slice(KV_HEADS, None), torch.Tensor.float)):
        got_turned, was = (turned(x[:, part].transpose(0, 1)) for x in (held, kv))
        assert bool(((got_turned - was).abs() <= 0.501 * was.abs().amax(-1, keepdim=True) / 127).all())
    expected = plain_attention(q, held[:, :KV_HEADS], held[:, KV_HEADS:], None)
    torch.testing.assert_close(torch.cat(got).double(), expected, rtol=0, atol=1e-5)


def test_int8_caches_grow_and_keep_zeros():
    cache = KVCache(1, 4, 2000, dtype=torch.int8, device=CPU, fixed=False)
    before = cache.nbytes
    assert before == 2 * 512 * (4 + 4)
    cache.put(slice(0, 2), torch.tensor([[[0.0] * 4, [1.0, -127.0, 3.4, 0.0]]] * 2))
    cache.reserve(600)
    assert cache.nbytes == 2 * before
    keys, values = cache.held(0, 2)
    assert not keys.any()
    assert values[0, 1].tolist() == [1, -127, 3, 0]
    cache.put(torch.tensor([5]), torch.ones(1, 2, 4))
    torch.testing.assert_close(cache.held(5, 6)[0], torch.ones(1, 1, 4))


def test_two_elements_to_a_byte():
    """Within half a step of a turned vector, whatever the pieces; half of int8's memory but for the scales."""
    kv = torch.randn(40, 2 * KV_HEADS, DIM)
    turn = Turn.of(torch.randn(KV_HEADS, DIM).exp2())
    cache = KVCache(KV_HEADS, DIM, CONTEXT, dtype=torch.uint8, device=CPU, fixed=False, turn=turn)
    assert cache.kv.shape[-1] == DIM // 2
    assert cache.nbytes == 2 * KV_HEADS * cache.kv.shape[2] * (DIM // 2 + 4)
    cache.put(slice(0, 13), kv[:13])
    cache.put(slice(13, 40), kv[13:])
    keys, values = cache.held(0, 40)
    by_signs = Turn.plain(KV_HEADS, DIM, CPU).turned
    for held, was, turned in ((keys, kv[:, :KV_HEADS], turn.turned), (values, kv[:, KV_HEADS:], by_signs)):
        was = turned(was.transpose(0, 1))
        step = was.abs().amax(-1, keepdim=True) / 7
        assert bool(((turned(held) - was).abs() <= 0.501 * step).all())


@pytest.mark.parametrize("dim", [64, 80, 96, 7, 256])
def test_turned_keys_are_as_long_and_turn_back(dim):
    turn, keys = Turn.of(torch.randn(2, dim).exp2()), torch.randn(2, 5, dim)
    torch.testing.assert_close(turn.back(turn.turned(keys)), keys)
    q = torch.randn(2, 5, dim)
    scores = (q * turn.units[:, None]) @ (turn.signs.float() / turn.size) @ turn.turned(keys).mT
    torch.testing.assert_close(scores, q @ keys.mT, atol=1e-4, rtol=1e-4)
    spread = turn.turned(torch.eye(dim)[None].expand(2, -1, -1) * turn.units[:, None])
    assert bool((spread.abs().sum(-1) == turn.size).all())


def test_new_cache_holds_no_nan():
    assert torch.equal(
        cache_of(fixed=True, fill=0.0).kv,
        KVCache(KV_HEADS, DIM, CONTEXT, dtype=torch.float32, device=CPU, fixed=True).kv,
    )


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 4, 48), (1, 1, 48)])
def test_rms_norm(shape):
    weight, x = torch.randn(48).to(torch.bfloat16), 10 * torch.randn(shape)
    expected = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    got = RmsNorm(weight, 1e-5)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_zeros():
    assert torch.equal(RmsNorm(torch.ones(8), 1e-6)(torch.zeros(1, 8)), torch.zeros(1, 8))
