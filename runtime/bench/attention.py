"""Causal attention of prompts beside torch's own ways to compute it, each against float64 in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbq.formats.packing import PackedWeight
from lbq.runtime.bench.checks import relative_error
from lbq.runtime.bench.context import Bench
from lbq.runtime.bench.timing import spent
from lbq.runtime.cache import KVCache
from lbq.runtime.kernels import prompt
from lbq.runtime.kernels.attention import Cache, Heads
from lbq.runtime.kernels.cuda import CudaLinear

Call = Callable[[], torch.Tensor]
BOUND = 1e-3  # of an error
CHECKED = 1024  # tokens up to which all of a result is compared with float64, and of longer ones so many at their end
UNFUSED_BYTES = 16e9  # of scores that the unfused way may take


@dataclass(frozen=True)
class Shape:
    """``batch`` texts of ``tokens``, by ``heads`` whose keys are shared by ``group`` of them."""

    batch: int
    kv_heads: int
    group: int
    dim: int
    tokens: int

    @property
    def heads(self) -> Heads:
        """For our kernel, to which texts are heads."""
        return Heads(self.batch * self.kv_heads, self.group, self.dim, self.dim, self.dim**-0.5)

    @property
    def flops(self) -> float:
        """Of what is not masked."""
        return 2.0 * self.batch * self.kv_heads * self.group * self.dim * self.tokens * (self.tokens + 1)

    def __str__(self) -> str:
        return f"{self.batch} × {self.kv_heads * self.group} × {self.tokens} × {self.dim}"


SMALL = [Shape(batch, heads, 1, 64, m) for batch, heads in ((1, 4), (1, 8), (2, 8)) for m in (128, 256, 512)]
REAL = [Shape(1, 8, 4, 128, m) for m in (2048, 8192, 32768, 131072)]


class Inputs:
    """Random q, k and v of a shape, as our kernel and as torch takes them."""

    def __init__(self, bench: Bench, shape: Shape) -> None:
        heads = shape.heads
        cache = KVCache(heads.kv_heads, shape.dim, shape.tokens, dtype=torch.float16, device=bench.device, fixed=True)
        cache.kv.normal_()
        self.shape, self.heads, self.cache = shape, heads, Cache(cache.kv)
        self.q = torch.randn(shape.tokens, heads.kv_heads * shape.group * shape.dim, device=bench.device).half()
        by_head = self.q.view(shape.tokens, shape.batch, -1, shape.dim).permute(1, 2, 0, 3).contiguous()
        self.torch = (by_head, *(x.view(shape.batch, -1, shape.tokens, shape.dim) for x in cache.kv))

    def ours(self) -> torch.Tensor:
        return prompt.attend(self.q, self.heads, 0, self.cache)

    def unfused(self) -> torch.Tensor:
        """matmul, mask, softmax, matmul: what a model in plain torch does."""
        q, k, v = self._expanded()
        scores = q @ k.mT * self.shape.dim**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.matmul(weights, v)

    def flash(self) -> torch.Tensor:
        """torch's flash attention; grouped heads read the same keys."""
        q, k, v = self.torch
        backends = [SDPBackend.FLASH_ATTENTION] if q.is_cuda else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shape.group > 1)

    def _expanded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.torch
        return q, k.repeat_interleave(self.shape.group, 1), v.repeat_interleave(self.shape.group, 1)

    def expected(self) -> torch.Tensor:
        """float64 [CHECKED at most, heads · dim] of the last tokens."""
        q, k, v = self._expanded()
        tokens = self.shape.tokens
        first = max(0, tokens - (CHECKED if tokens <= 8192 else 16))
        rows = []
        for h in range(q.shape[1]):  # one head at a time: scores in float64 are large
            scores = q[:, h, first:].double() @ k[:, h].double().mT * self.shape.dim**-0.5
            hidden = torch.arange(tokens, device=q.device) > torch.arange(first, tokens, device=q.device)[:, None]
            rows.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, h].double())
        return torch.stack(rows, 1).permute(2, 0, 1, 3).flatten(1)

    def last(self, result: torch.Tensor, rows: int) -> torch.Tensor:
        """The last tokens of a result as [rows, heads · dim], whichever way it came."""
        if result.dim() == 4:
            result = result.permute(2, 0, 1, 3).flatten(1)
        return result[-rows:]


def causal(bench: Bench) -> None:
    """µs in a CUDA graph, memory beside the inputs, and errors against float64, of ours and torch's."""
    bench.say("| texts × heads × tokens × dim | ours | torch, unfused | torch, flash | unfused ÷ ours | flash ÷ ours |")
    bench.say("|---|---|---|---|---|---|")
    for shape in [Shape(2, 2, 1, 64, 40), Shape(1, 2, 2, 64, 40)] if bench.toy else [*SMALL, *REAL]:
        if bench.left() < 10:
            bench.say("No time left.")
            return
        inputs = Inputs(bench, shape)
        expected = inputs.expected()
        ways: dict[str, Call] = {"ours": inputs.ours, "unfused": inputs.unfused, "flash": inputs.flash}
        if shape.batch * shape.kv_heads * shape.group * shape.tokens**2 * 6 > UNFUSED_BYTES:
            del ways["unfused"]
        cells, times = [], {}
        for name in ("ours", "unfused", "flash"):
            if name not in ways:
                cells.append("")
                continue
            error = relative_error(inputs.last(ways[name](), len(expected)), expected)
            memory = _peak(bench, ways[name])
            least = max(1, min(20, int(2e10 / shape.flops)))
            times[name] = bench.clock.seconds([ways[name]], replays=7 if shape.tokens < 100000 else 3, least=least)
            rate = f"{shape.flops / times[name] / 1e12:.0f} TFLOP/s, " if shape in REAL else ""
            bad = " **wrong**" if name == "ours" and not error <= BOUND else ""
            cells.append(f"{times[name] * 1e6:.1f} µs, {rate}{memory / 1e6:.1f} MB, {error:.0e}{bad}")
        cells += [f"{times[name] / times['ours']:.2f}" if name in times else "" for name in ("unfused", "flash")]
        bench.say(f"| {shape} | " + " | ".join(cells) + " |")
        del inputs, expected, ways
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _peak(bench: Bench, call: Call) -> int:
    """Bytes of memory that a call takes, its result included."""
    if bench.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def blocks(bench: Bench) -> None:
    """Attention and an INT8 linear layer behind it, launched from Python and in a CUDA graph."""
    bench.say(
        "| texts × heads × tokens × dim | | ours | torch, unfused | torch, flash | unfused ÷ ours | flash ÷ ours |"
    )
    bench.say("|---|---|---|---|---|---|---|")
    for shape in [Shape(2, 2, 1, 64, 40)] if bench.toy else [*SMALL, REAL[0]]:
        inputs = Inputs(bench, shape)
        n = shape.kv_heads * shape.group * shape.dim
        weight = _weight(bench, n)
        linear = CudaLinear(weight)
        codes, scales = _codes(weight)
        dense = (codes.double() * scales.double()).mT
        rows = min(CHECKED, shape.tokens) * shape.batch
        expected = _texts(inputs, inputs.expected())[-rows:] @ dense
        ways: dict[str, Call] = {
            "ours": partial(_ours, inputs, linear),
            "unfused": partial(_plain, inputs, inputs.unfused, codes, scales),
            "flash": partial(_plain, inputs, inputs.flash, codes, scales),
        }
        rows_of: dict[str, dict[str, float]] = {"launched": {}, "graph": {}}
        errors = {}
        for name, call in ways.items():
            errors[name] = relative_error(call()[-rows:], expected)
            rows_of["launched"][name] = spent(bench.device, partial(_many, call), 5) / MANY
            rows_of["graph"][name] = bench.clock.seconds([call], replays=7, least=10)
        for how, times in rows_of.items():
            bad = " **wrong**" if not errors["ours"] <= 2 * BOUND else ""
            cells = [f"{times[name] * 1e6:.1f} µs, {errors[name]:.0e}" for name in times]
            ratios = [f"{times[name] / times['ours']:.2f}" for name in ("unfused", "flash")]
            bench.say(f"| {shape} | {how} | " + " | ".join([*cells, *ratios]) + f" |{bad}")


MANY = 20  # calls from Python that are timed together


def _many(call: Call) -> None:
    for _ in range(MANY):
        call()


def _weight(bench: Bench, n: int) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31 - 1, (n, n // 4), dtype=torch.int32, device=bench.device)
    scales = (torch.rand(n, 1, device=bench.device) * 1e-3 + 1e-4).bfloat16()
    return PackedWeight(words, scales, 8, n, n)


def _codes(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and scales float16 [N, 1], as plain torch would hold them."""
    scales = weight.scales.float()
    return (weight.dequantize().float() / scales).round().to(torch.int8), scales.half()


def _texts(inputs: Inputs, result: torch.Tensor) -> torch.Tensor:
    """A result [T, batch · heads · dim] or torch's as [T · batch, heads · dim]."""
    shape = inputs.shape
    return inputs.last(result, shape.tokens).reshape(-1, shape.kv_heads * shape.group * shape.dim)


def _ours(inputs: Inputs, linear: CudaLinear) -> torch.Tensor:
    operand = prompt.operand(_texts(inputs, inputs.ours()))
    y = prompt.multiply(operand, linear.weight, linear.norms, None)
    assert y.units is not None
    assert y.factors is not None
    return y.values * y.units[:, None] * y.factors


def _plain(inputs: Inputs, attend: Call, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return functional.linear(_texts(inputs, attend()), codes.half() * scales)
