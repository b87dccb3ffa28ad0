"""What a prompt's tokens go through on a CUDA device: float16 operands, few launches, nothing kept in float32 but the
residual stream.

Products run on tensor cores with float32 sums. A token's activations are divided by their largest magnitude, and a row
of weights by a power of two no less than its own, before they are rounded to float16, so that its range never matters
and its 11 bits are what is lost; a token's unit and a row's factor are multiplied back by whichever kernel reads the
result. Results are float16 too: an operand is of at most 2^15 / K and a weight of at most 1, so that no sum of K leaves
float16's range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from triton import cdiv, next_power_of_2

from lbq.runtime.kernels.attention import Cache, Heads, Norms
from lbq.runtime.kernels.dequant import dequantize, tiles
from lbq.runtime.kernels.gemv import ArrangedWeight
from lbq.runtime.kernels.gpu import gpu_of
from lbq.runtime.kernels.prompt import triton as kernels

__all__ = [
    "Operand",
    "Result",
    "add_norm",
    "attend",
    "float16_product",
    "gate",
    "heads",
    "multiply",
    "operand",
    "why_not",
]

SCRATCH_BYTES = 256 << 20  # of weights in float16 at a time: all of an 8B model's largest matrix


@dataclass(frozen=True)
class Operand:
    """Activations [M, K] = ``values`` float16 · ``units`` float32 [M]."""

    values: torch.Tensor
    units: torch.Tensor

    @staticmethod
    def empty(m: int, k: int, device: torch.device) -> Operand:
        values = torch.empty((m, k), dtype=torch.float16, device=device)
        return Operand(values, torch.empty(m, dtype=torch.float32, device=device))

    def float(self) -> torch.Tensor:
        """float32 [M, K]"""
        return self.values * self.units[:, None]


@dataclass(frozen=True)
class Result:
    """A product [M, N] without its bias: ``values`` float16 · ``units`` [M] · ``factors`` [N], or float32 by itself.

    ``factors`` are powers of two in bfloat16.
    """

    values: torch.Tensor
    units: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # float32 [N], still to be added

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a kernel takes; what is not there stands in for itself."""
        y = self.values
        return y, _or(self.units, y), _or(self.factors, y), _or(self.bias, y)

    def options(self) -> dict[str, bool]:
        assert (self.units is None) == (self.factors is None)
        assert self.values.is_contiguous()
        return {"SCALED": self.units is not None, "HAS_BIAS": self.bias is not None}


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor


def why_not(heads: Heads, width: int) -> str | None:
    """Why these kernels cannot serve a layer with vectors of up to ``width``, or None where they can."""
    if heads.dim > 256:
        return f"heads of {heads.dim}: they must be of at most 256"
    if width > 1 << 15:
        return f"vectors of {width}: they must be of at most {1 << 15}"
    return None


def _peak(k: int) -> float:
    """The largest magnitude of an operand: K of them, times weights of at most 1, are at most 2^15."""
    return 2.0**15 / int(next_power_of_2(k))


def _row(k: int) -> dict[str, int]:
    """Options of kernels with a token a program."""
    block = next_power_of_2(k)
    return {"BK": block, "num_warps": max(1, min(16, block // 1024))}


def operand(x: torch.Tensor) -> Operand:
    """[M, K] of any float type as an operand."""
    m, k = x.shape
    assert x.is_contiguous()
    out = Operand.empty(m, k, x.device)
    kernels.operand[(m,)](x, out.values, out.units, k, PEAK=_peak(k), **_row(k))
    return out


def add_norm(x: torch.Tensor, y: Result | None, norm: Norms | None) -> Operand | None:
    """Add ``y`` to the residual stream ``x`` float32 [M, K], in place; then its norm as an operand, if one is given."""
    m, k = x.shape
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert y is None or y.values.shape == x.shape
    out = None if norm is None else Operand.empty(m, k, x.device)
    kernels.add_norm[(m,)](
        x,
        *(Result(x) if y is None else y).parts(),
        x if norm is None else norm.weight,
        x if out is None else out.values,
        x if out is None else out.units,
        k,
        ADD=y is not None,
        **(Result(x) if y is None else y).options(),
        NORM=norm is not None,
        EPS=0.0 if norm is None else norm.eps,
        PEAK=_peak(k),
        **_row(k),
    )
    return out


def gate(y: Result, activation: Literal["silu", "gelu", "gelu_tanh"]) -> Operand:
    """activation(gate) · up of the product [M, 2K] of both."""
    m, k = y.values.shape[0], y.values.shape[1] // 2
    out = Operand.empty(m, k, y.values.device)
    kernels.gate[(m,)](
        *y.parts(), out.values, out.units, k, **y.options(), ACTIVATION=activation, PEAK=_peak(k), **_row(k)
    )
    return out


def heads(
    y: Result,
    heads: Heads,
    q_norm: Norms | None,
    k_norm: Norms | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    start: int,
    held: Cache,
) -> torch.Tensor:
    """Norm and turn q and k of the product of q/k/v, put k and v into the cache from ``start`` on: q [M, heads · dim].

    ``angles``: cosines and sines float32 [M, rope_dims/2] of the tokens' positions.
    """
    cos, sin = angles
    m, slots = y.values.shape[0], held.kv.shape[2]
    count = heads.kv_heads * heads.group
    assert y.values.shape == (m, heads.width)
    assert cos.shape == sin.shape == (m, heads.rope_dims // 2)
    assert held.bits < 16 or held.kv.shape == (2, heads.kv_heads, slots, heads.dim)
    assert held.kv.is_contiguous()
    assert start + m <= slots
    to, first = held.kv, start
    if held.scales is not None:
        to, first = torch.empty((2, heads.kv_heads, m, heads.dim), dtype=torch.float16, device=y.values.device), 0
    q = torch.empty((m, count * heads.dim), dtype=to.dtype, device=y.values.device)
    block = 16
    kernels.heads[(cdiv(m, block), count + 2 * heads.kv_heads)](
        *y.parts(),
        cos if q_norm is None else q_norm.weight,
        cos if k_norm is None else k_norm.weight,
        cos,
        sin,
        q,
        to,
        m,
        first,
        to.shape[2],
        H=count,
        KV_HEADS=heads.kv_heads,
        D=heads.dim,
        DIMS=heads.rope_dims,
        Q_EPS=None if q_norm is None else q_norm.eps,
        K_EPS=None if k_norm is None else k_norm.eps,
        **y.options(),
        BM=block,
        num_warps=4,
    )
    if held.scales is not None:
        close(to, start, held)
    return q


def close(new: torch.Tensor, start: int, held: Cache) -> None:
    """Put keys and values float16 [2, kv_heads, M, dim] into a cache of few bits from ``start`` on."""
    _, kv_heads, m, dim = new.shape
    assert held.scales is not None
    assert held.turn is not None
    block = 16
    kernels.close[(cdiv(m, block), 2 * kv_heads)](
        new,
        held.turn.units,
        held.turn.signs,
        held.kv,
        held.scales,
        m,
        start,
        held.kv.shape[2],
        KV_HEADS=kv_heads,
        D=dim,
        BITS=held.bits,
        BM=block,
        num_warps=4,
    )


def attend(q: torch.Tensor, heads: Heads, start: int, held: Cache) -> torch.Tensor:
    """softmax(scale · q · kᵀ) · v of tokens ``start``, … which the cache holds, as ``q`` [M, heads · dim].

    Of a cache of few bits they see a copy in float16: opening it for every 128 tokens takes as long as the products.
    """
    m = q.shape[0]
    if held.scales is not None:
        held = opened(held, start + m)
    slots, count = held.kv.shape[2], heads.kv_heads * heads.group
    assert q.shape == (m, count * heads.dim)
    assert q.is_contiguous()
    assert held.kv.shape == (2, heads.kv_heads, slots, heads.dim)
    assert start + m <= slots
    out = torch.empty_like(q)
    tile = attention_tile(heads.dim, m, _hopper(q.device))
    kernels.attend[(count, cdiv(m, tile.tokens))](
        q,
        held.kv,
        out,
        m,
        start,
        slots,
        KV_HEADS=heads.kv_heads,
        G=heads.group,
        D=heads.dim,
        SCALE=heads.scale,
        WINDOW=heads.window or 0,
        BM=tile.tokens,
        BN=tile.block,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out


def opened(held: Cache, stop: int) -> Cache:
    """The first ``stop`` slots of a cache of few bits in float16."""
    _, kv_heads, slots, width = held.kv.shape
    dim = width * 8 // held.bits
    assert held.scales is not None
    assert held.turn is not None
    out = torch.empty((2, kv_heads, stop, dim), dtype=torch.float16, device=held.kv.device)
    block = 32
    kernels.open_all[(cdiv(stop, block), 2 * kv_heads)](
        held.kv,
        held.scales,
        held.turn.units,
        held.turn.signs,
        out,
        stop,
        slots,
        KV_HEADS=kv_heads,
        D=dim,
        BITS=held.bits,
        SIZE=held.turn.size,
        BS=block,
        num_warps=4,
    )
    return Cache(out)


@dataclass(frozen=True)
class AttentionTile:
    """``tokens`` a program, ``block`` keys at a time."""

    tokens: int
    block: int
    stages: int
    warps: int


def attention_tile(dim: int, m: int, hopper: bool) -> AttentionTile:
    """By the registers and the shared memory that the head's width takes; ``hopper``: for its tensor cores."""
    if m <= 16:
        return AttentionTile(16, 64, 2, 4)
    if dim > 128:
        return AttentionTile(64, 32, 2, 4 if hopper else 8)
    return AttentionTile(128, 64 if hopper else 32, 3, 8)


def _hopper(device: torch.device) -> bool:
    gpu = gpu_of(device)
    return gpu is not None and gpu.capability[0] == 9


def multiply(x: Operand, weight: ArrangedWeight, norms: torch.Tensor, bias: torch.Tensor | None) -> Result:
    """x · Wᵀ; ``norms`` as ``dequant.row_norms`` gives them. Opens at most SCRATCH_BYTES of weights at a time."""
    m, k = x.values.shape
    assert k == weight.k
    y = torch.empty((m, weight.n), dtype=torch.float16, device=x.values.device)
    parts = tiles(weight.n, 2 * k, SCRATCH_BYTES)
    scratch = torch.empty((parts[0][1], k), dtype=torch.float16, device=x.values.device)
    for start, stop in parts:
        opened = dequantize(weight, start, stop, scratch[: stop - start], norms)
        float16_product(x.values, opened, out=y[:, start:stop])
    return Result(y, x.units, norms, bias)


def float16_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """float16 a [M, K] · b [N, K]ᵀ, summed in float32: float16 [M, N]."""
    if a.is_cuda:
        return torch.mm(a, b.t(), out=out)
    y = (a.float() @ b.float().t()).half()  # the interpreter's tensors
    return y if out is None else out.copy_(y)
