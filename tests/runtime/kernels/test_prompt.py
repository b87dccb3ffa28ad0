"""The kernels that a prompt's tokens share, against float64; see test_gemv.py for where this runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import BITS, PackedWeight
from lbq.runtime.cache import KVCache
from lbq.runtime.kernels import dequant, gemv, prompt
from lbq.runtime.kernels.attention import Cache, Heads, Norms
from lbq.runtime.kernels.attention.reference import new_entry
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.prompt import Operand, Result
from lbq.runtime.turn import Turn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def result(m: int, n: int, *, scaled: bool, bias: bool) -> tuple[Result, torch.Tensor]:
    """A product's result, and its value in float64."""
    values, units, added = random(m, n), random(m).abs(), random(n, seed=2)
    factors = torch.exp2(random(n, seed=1).round()).bfloat16()
    found = Result(
        values.half() if scaled else values,
        units if scaled else None,
        factors if scaled else None,
        added if bias else None,
    )
    value = found.values.double()
    if scaled:
        value = value * units.double()[:, None] * factors.double()
    return found, value + added.double() if bias else value


def value(x: Operand) -> torch.Tensor:
    return x.values.double() * x.units.double()[:, None]


WAYS = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("scaled", "bias"), WAYS)
@pytest.mark.parametrize("k", [96, 1536])
def test_residual_and_norm(k: int, scaled: bool, bias: bool, relative_error: Error) -> None:
    x, norm = random(5, k), Norms(1 + 0.2 * random(k), 1e-5)
    y, y64 = result(5, k, scaled=scaled, bias=bias)
    x[1] *= 1e6
    x[2], y.values[2] = 0, 0
    y64[2] = y.bias.double() if bias else 0
    expected = x.double() + y64
    got = prompt.add_norm(x, y, norm)
    assert relative_error(x, expected) <= 1e-6
    normed = expected / (expected.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    assert relative_error(value(got), normed) <= 3e-4
    assert float(got.values.abs().max()) * k <= 2.0**15
    before = x.clone()
    assert relative_error(value(prompt.add_norm(x, None, norm)), normed) <= 3e-4
    assert torch.equal(x, before)
    assert prompt.add_norm(x, y, None) is None
    assert relative_error(x, expected + y64) <= 1e-6


@pytest.mark.parametrize(("scaled", "bias"), WAYS)
def test_gate(scaled: bool, bias: bool, relative_error: Error) -> None:
    y, y64 = result(4, 2 * 160, scaled=scaled, bias=bias)
    gate, up = y64.chunk(2, dim=1)
    act = torch.nn.functional
    for name, expected in (("silu", act.silu(gate)), ("gelu", act.gelu(gate))):
        assert relative_error(value(prompt.gate(y, name)), expected * up) <= 3e-4


def test_operands_of_any_range(relative_error: Error) -> None:
    x = random(4, 200)
    x[1] *= 1e20
    x[2] *= 1e-20
    x[3] = 0
    got = value(prompt.operand(x))
    for row in range(3):
        assert relative_error(got[row], x[row].double()) <= 3e-4
    assert not got[3].any()
    x[0, 7] = float("nan")
    assert bool(prompt.operand(x).values[0, 7].isnan())


HEADS = [
    Heads(2, 3, 64, 64, 0.125),
    Heads(1, 2, 80, 32, 0.1),
    Heads(2, 1, 32, 32, 0.2, 9),
    Heads(1, 1, 256, 256, 0.06),
]


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize(
    ("norm", "kind"), [(False, torch.float16), (True, torch.float16), (True, torch.int8), (True, torch.uint8)]
)
def test_heads(shape: Heads, norm: bool, kind: torch.dtype, relative_error: Error) -> None:
    m, start, slots = 19, 5, 32
    y, y64 = result(m, shape.width, scaled=True, bias=norm)
    norms = Norms(1 + 0.2 * random(shape.dim), 1e-6) if norm else None
    angle = torch.arange(start, start + m)[:, None] * torch.rand(shape.rope_dims // 2)
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    turn = Turn.of((0.3 * torch.randn(shape.kv_heads, shape.dim)).exp2().to(DEVICE))
    cache = KVCache(shape.kv_heads, shape.dim, slots, dtype=kind, device=DEVICE, fixed=True, turn=turn)
    q = prompt.heads(y, shape, norms, norms, (cos, sin), start, Cache(cache.kv, cache.scales, cache.turn))
    expected = [new_entry(y64[i], shape, norms, norms, cos[i], sin[i]) for i in range(m)]
    keys, values = cache.held(start, start + m)
    bound = {torch.float16: 4e-4, torch.int8: 1.5e-2, torch.uint8: 0.25}[kind]
    assert relative_error(q, torch.stack([e[0].flatten() for e in expected])) <= 4e-4
    assert relative_error(keys, torch.stack([e[1] for e in expected], 1)) <= bound
    assert relative_error(values, torch.stack([e[2] for e in expected], 1)) <= bound
    assert not cache.kv[:, :, :start].any()
    assert not cache.kv[:, :, start + m :].any()
    if kind != torch.float16:  # as the cache itself would have stored it
        other = KVCache(shape.kv_heads, shape.dim, slots, dtype=kind, device=DEVICE, fixed=True, turn=turn)
        shifts = torch.tensor([0, 4], device=DEVICE)
        other.put(slice(start, start + m), torch.stack([torch.cat(e[1:]) for e in expected]).float())
        nibbles = [
            cache_.kv.int() if kind == torch.int8 else cache_.kv.int()[..., None] >> shifts & 15
            for cache_ in (other, cache)
        ]
        assert int((nibbles[0] - nibbles[1]).abs().max()) <= 1


def float64_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Heads, start: int) -> torch.Tensor:
    """q [M, heads · dim], k and v [kv_heads, start + M, dim]."""
    m, length = q.shape[0], k.shape[1]
    split = q.double().view(m, shape.kv_heads, shape.group, shape.dim)
    scores = torch.einsum("mhgd,hnd->hgmn", split, k.double()) * shape.scale
    distance = torch.arange(start, start + m)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (shape.window or length))
    weights = scores.masked_fill(hidden.to(DEVICE), -math.inf).softmax(-1)
    return torch.einsum("hgmn,hnd->mhgd", weights, v.double()).flatten(1)


@pytest.mark.parametrize("shape", [*HEADS, Heads(1, 4, 128, 128, 0.09)], ids=str)
@pytest.mark.parametrize("kind", [torch.float16, torch.int8, torch.uint8])
@pytest.mark.parametrize(("m", "start"), [(150, 0), (40, 75), (3, 130)])
def test_attention(shape: Heads, kind: torch.dtype, m: int, start: int, relative_error: Error) -> None:
    turn = Turn.of((0.3 * torch.randn(shape.kv_heads, shape.dim)).exp2().to(DEVICE))
    cache = KVCache(shape.kv_heads, shape.dim, start + m + 3, dtype=kind, device=DEVICE, fixed=True, turn=turn)
    cache.put(slice(0, start + m), random(start + m, 2 * shape.kv_heads, shape.dim))
    if kind == torch.float16:
        cache.kv[:, :, start + m :] = float("nan")  # never written
    q = random(m, shape.kv_heads * shape.group * shape.dim).half()
    keys, values = cache.held(0, start + m)
    expected = float64_attention(q, keys, values, shape, start)
    got = prompt.attend(q, shape, start, Cache(cache.kv, cache.scales, cache.turn))
    assert relative_error(got, expected) <= 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_products(bits: int, random_weight: Weights, relative_error: Error, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(33, 576, bits, 64, str(DEVICE))
    weight.scales[3] *= 1e10  # one factor for each row
    arranged = gemv.arrange(weight)
    monkeypatch.setattr(prompt, "SCRATCH_BYTES", 2 * 576 * 12)  # several tiles
    x = random(20, 576)
    x[1] *= 1e10
    bias = random(33)
    y = prompt.multiply(prompt.operand(x), arranged, dequant.row_norms(arranged), bias)
    found = y.values.double() * y.units.double()[:, None] * y.factors.double()
    expected = float64_product(x, weight, None)
    for row in (0, 1):
        others = torch.arange(33, device=DEVICE) != 3
        assert relative_error(found[row, others], expected[row, others]) <= 8e-4
        assert relative_error(found[row, 3:4], expected[row, 3:4]) <= 3e-3
    assert y.bias is bias


@pytest.mark.skipif(INTERPRETED, reason="sizes of real models")
@pytest.mark.parametrize("eight", [False, True])
def test_real_attention(eight: bool, relative_error: Error) -> None:
    shape, m, start = Heads(8, 4, 128, 128, 128**-0.5), 1000, 3000
    kind = torch.int8 if eight else torch.float16
    cache = KVCache(8, 128, 4096, dtype=kind, device=DEVICE, fixed=True)
    cache.put(slice(0, 4000), random(4000, 16, 128))
    q = random(m, 4096).half()
    got = prompt.attend(q, shape, start, Cache(cache.kv, cache.scales, cache.turn))
    assert relative_error(got, float64_attention(q, *cache.held(0, 4000), shape, start)) <= (2e-3 if eight else 1e-3)
    for _ in range(20):
        assert torch.equal(prompt.attend(q, shape, start, Cache(cache.kv, cache.scales, cache.turn)), got)
