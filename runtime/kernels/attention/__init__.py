"""One token's attention in one launch, of one text or several: from raw q, k, v to what the output projection reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import next_power_of_2

from lbq.formats.spec import Attention
from lbq.runtime.kernels.attention import packed
from lbq.runtime.kernels.attention import short as short_kernel
from lbq.runtime.kernels.attention import triton as kernels
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.gpu import LEAST_SHARED, Gpu
from lbq.runtime.kernels.planes import Activations, launch_options, plane_layout
from lbq.runtime.turn import Turn

__all__ = [
    "Cache",
    "Heads",
    "Norms",
    "Scratch",
    "Short",
    "Split",
    "attend",
    "attend_short",
    "no_room",
    "serves_short",
    "shared_memory",
    "split_for",
    "why_not",
    "writes_planes",
]


@dataclass(frozen=True)
class Heads:
    """The shape of one layer's attention."""

    kv_heads: int
    group: int  # query heads that share a key's head
    dim: int
    rope_dims: int  # the first of ``dim`` that rope turns
    scale: float
    window: int | None = None  # tokens that a token sees, itself included

    @classmethod
    def of(cls, spec: Attention) -> Heads:
        """Those of a model's attention."""
        return cls(spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim, spec.rope.dims, spec.scale, spec.window)

    @property
    def width(self) -> int:
        """Elements of q, k and v together."""
        return (self.group + 2) * self.kv_heads * self.dim


@dataclass(frozen=True)
class Split:
    """How the cache is cut: into at most ``splits`` parts a head, of at least ``least`` tokens, ``block`` at a time."""

    splits: int
    block: int = 64
    least: int = 64
    stages: int = 2
    warps: int = 4
    ahead: int | None = None  # tokens of a part that are called into L2 while the launch before ends; None: ``least``

    def __post_init__(self) -> None:
        assert self.splits >= 1
        assert self.block in (16, 32, 64, 128, 256)
        assert self.least % self.block == 0


def split_for(heads: Heads, sm_count: int, dtype: torch.dtype = torch.float16) -> Split:
    """A program for each multiprocessor, once a text is long enough to keep them busy, each with two blocks under way,
    64 kB at heads of 128 and at wider ones: what 99 kB of shared memory hold. At 4 bits blocks take half of that: two
    programs."""
    wide = 2 if heads.dim > 128 else 1
    if dtype == torch.uint8:
        splits = max(1, min(64, next_power_of_2(2 * sm_count // heads.kv_heads + 1) // 2))
        return Split(
            splits, 128 // wide, 128 // wide, stages=3, warps=4 if heads.dim > 64 else 2
        )  # warps share a quarter of a head
    splits = max(1, min(64, sm_count // heads.kv_heads))
    block = (128 if dtype == torch.int8 else 64) // wide
    return Split(splits, block, block, stages=3)


@dataclass(frozen=True)
class Short:
    """How a text of up to ``until`` tokens is attended to: in at most ``parts`` parts, ``block`` tokens at a time."""

    until: int = 2048
    block: int = 32
    warps: int = 2
    parts: int = 16
    onward: bool = False  # see ``arrivals.let_in``

    def __post_init__(self) -> None:
        assert self.block in (16, 32, 64, 128, 256)
        assert self.warps in (1, 2, 4, 8, 16)
        assert self.parts in (1, 2, 4, 8, 16, 32)

    def fits(self, heads: Heads) -> bool:
        """Whether a block has tokens for every lane."""
        return bool(self.block * next_power_of_2(heads.dim) >= 256 * self.warps)


@dataclass(frozen=True)
class Norms:
    """Weights of a head's norm for q or k, float32 [dim], and its eps."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Cache:
    """Keys and values [2, kv_heads, slots, dim] in 16 bits; or as :class:`lbq.runtime.cache.KVCache` keeps few bits.

    Of several texts there is one more axis before these.
    """

    kv: torch.Tensor
    scales: torch.Tensor | None = None  # float32 [2, kv_heads, slots]
    turn: Turn | None = None

    @property
    def bits(self) -> int:
        """Of an element: 16, 8 or 4."""
        return {torch.int8: 8, torch.uint8: 4}.get(self.kv.dtype, 16)


@dataclass(frozen=True)
class Scratch:
    """What programs of one launch leave to each other; layers of one shape take turns with it."""

    parts: torch.Tensor  # float32 [texts, kv_heads, splits, group, dim]; short: [texts, heads, parts, dim]
    peaks: torch.Tensor  # float32 [texts, kv_heads, splits, group]; short: [texts, heads, parts]
    sums: torch.Tensor
    counters: torch.Tensor  # int32 [texts, kv_heads]; short: [texts, heads]; zero between launches

    @staticmethod
    def empty(heads: Heads, split: Split, device: torch.device, texts: int = 1) -> Scratch:
        """For ``attend``."""
        return Scratch._of((texts, heads.kv_heads), (split.splits, heads.group), heads.dim, device)

    @staticmethod
    def empty_short(heads: Heads, short: Short, device: torch.device, texts: int = 1) -> Scratch:
        """For ``attend_short``."""
        return Scratch._of((texts, heads.kv_heads * heads.group), (short.parts,), heads.dim, device)

    @staticmethod
    def _of(merged: tuple[int, ...], parts: tuple[int, ...], dim: int, device: torch.device) -> Scratch:
        rows = (*merged, *parts)
        return Scratch(
            torch.empty((*rows, dim), dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.zeros(merged, dtype=torch.int32, device=device),
        )


def why_not(heads: Heads) -> str | None:
    """Why this kernel cannot serve ``heads``, or None where it can."""
    if heads.dim % 8 or heads.dim > 256:
        return f"heads of {heads.dim}: they must be of at most 256, in eights"
    if not writes_planes(heads, 32):
        return f"heads of {heads.dim}, {heads.group} to a key's: they are no whole blocks of 32"
    return None


def shared_memory(heads: Heads, bits: int) -> int:
    """Bytes of it that a program takes at most, by ``split_for``, on a cache of so many bits: what every GPU has, but
    where 4 bits are turned by 256 × 256 signs."""
    return 144 << 10 if bits == 4 and heads.dim > 128 else LEAST_SHARED


def no_room(heads: Heads, bits: int, gpu: Gpu) -> str | None:
    """Why ``gpu`` cannot attend to a cache of so many bits, or None where it can."""
    needed = shared_memory(heads, bits)
    if needed <= gpu.shared_memory:
        return None
    had = gpu.shared_memory >> 10
    return f"heads of {heads.dim} take {needed >> 10} kB of shared memory a program, of which {gpu.name} has {had}"


def serves_short(heads: Heads) -> bool:
    """Whether ``attend_short`` can serve ``heads``."""
    return heads.dim % 32 == 0 and heads.dim <= 256


def writes_planes(heads: Heads, block: int) -> bool:
    """Whether the heads that share a key's are whole blocks of so many elements, as ``attend`` writes planes."""
    whole = heads.dim == next_power_of_2(heads.dim)  # a kernel's tile has nothing between its heads then
    return bool((heads.group if whole else 1) * heads.dim % block == 0)


def _together(heads: Heads, split: Split, bits: int) -> int:
    """Parts that a merge adds at once: 32 elements of them a thread."""
    rows = max(16 if bits == 4 else 1, next_power_of_2(heads.group))
    most = 32 * 32 * split.warps // rows // next_power_of_2(heads.dim)
    return int(min(next_power_of_2(split.splits), max(1, most)))


def attend(
    qkv: torch.Tensor,
    heads: Heads,
    q_norm: Norms | None,
    k_norm: Norms | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    cache: Cache,
    scratch: Scratch,
    split: Split,
    to: Activations | torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """softmax(scale · q · kᵀ) · v of the token at ``position``, whose k and v go into the cache, as planes into ``to``.

    ``qkv`` float32 [texts, width] as the projection made it: q and k are normed (or not) and turned here; ``angles``:
    cosines and sines float32 [≥ slots, rope_dims / 2]; ``position`` int64 [texts], below the cache's slots. ``to`` may
    be float32 [texts, heads · dim] too, and has to be where ``writes_planes`` says no. Products are of the
    cache's 16-bit type (float16 for an int8 cache) and summed in float32, like the softmax. Results repeat to the bit.
    """
    assert why_not(heads) is None
    assert isinstance(to, torch.Tensor) or writes_planes(heads, to.planes.block)
    _check(qkv, heads, angles, position, cache, to)
    texts = position.numel()
    assert scratch.parts.shape == (texts, heads.kv_heads, split.splits, heads.group, heads.dim)
    before, behind = _read(qkv, q_norm, k_norm, angles, position, cache), _written(scratch, to, cache)
    options = {
        "SPLITS": split.splits,
        "LEAST": split.least,
        "BLOCK": split.block,
        "STAGES": split.stages,
        "AHEAD": split.ahead or split.least,
        "TOGETHER": _together(heads, split, cache.bits),
        "num_warps": split.warps,
        **_constants(heads, q_norm, k_norm, to, pdl),
    }
    grid = (split.splits * heads.kv_heads, texts)
    if cache.scales is None:
        kernels.attend[grid](*before, *behind, **options)
        return
    assert cache.turn is not None
    packed.attend_packed[grid](
        *before,
        cache.scales,
        cache.turn.units,
        cache.turn.signs,
        *behind,
        BITS=cache.bits,
        SIZE=cache.turn.size,
        EMULATE=INTERPRETED,
        **options,
    )


def attend_short(
    qkv: torch.Tensor,
    heads: Heads,
    q_norm: Norms | None,
    k_norm: Norms | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    cache: Cache,
    scratch: Scratch,
    short: Short,
    to: Activations | torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """What :func:`attend` does, of a 16-bit cache that is not scaled; for texts of any length, made for short ones.

    ``serves_short(heads)`` must hold; ``scratch`` is of ``Scratch.empty_short``. Products are of float32.
    """
    assert serves_short(heads)
    assert isinstance(to, torch.Tensor) or heads.dim % to.planes.block == 0
    assert short.fits(heads)
    assert cache.scales is None
    assert cache.kv.dtype in (torch.float16, torch.bfloat16)
    _check(qkv, heads, angles, position, cache, to)
    queries, texts = heads.kv_heads * heads.group, position.numel()
    assert scratch.parts.shape == (texts, queries, short.parts, heads.dim)
    short_kernel.attend_short[(queries * short.parts, texts)](
        *_read(qkv, q_norm, k_norm, angles, position, cache),
        *_written(scratch, to, cache),
        PARTS=short.parts,
        BLOCK=short.block,
        WARPS=short.warps,
        ONWARD=short.onward,
        num_warps=short.warps,
        **_constants(heads, q_norm, k_norm, to, pdl),
    )


def _constants(
    heads: Heads, q_norm: Norms | None, k_norm: Norms | None, to: Activations | torch.Tensor, pdl: bool
) -> dict[str, int | float | None]:
    """What both kernels are compiled for."""
    columns, width, fold = (0, 0, 1.0) if isinstance(to, torch.Tensor) else plane_layout(to.planes)
    return {
        "KV_HEADS": heads.kv_heads,
        "G": heads.group,
        "D": heads.dim,
        "DIMS": heads.rope_dims,
        "SCALE": heads.scale,
        "WINDOW": heads.window or 0,
        "Q_EPS": None if q_norm is None else q_norm.eps,
        "K_EPS": None if k_norm is None else k_norm.eps,
        "C_OUT": columns,
        "XC_OUT": width,
        "FOLD_OUT": fold,
        "SIZE_OUT": 32 if isinstance(to, torch.Tensor) else to.planes.block,
        "PDL": pdl,
        **launch_options(pdl),
    }


def _read(
    qkv: torch.Tensor,
    q_norm: Norms | None,
    k_norm: Norms | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    cache: Cache,
) -> tuple[torch.Tensor, ...]:
    """What all kernels take first; a norm that is not there is stood in for."""
    q_weight, k_weight = (qkv if norm is None else norm.weight for norm in (q_norm, k_norm))
    return (qkv, q_weight, k_weight, *angles, position, cache.kv)


def _written(scratch: Scratch, to: Activations | torch.Tensor, cache: Cache) -> tuple[torch.Tensor | int, ...]:
    """What they take behind that: the scratch, the output and the cache's slots."""
    out = (to, to) if isinstance(to, torch.Tensor) else (to.planes.q, to.planes.scales)
    return (scratch.parts, scratch.peaks, scratch.sums, scratch.counters, *out, cache.kv.shape[-2])


def _check(
    qkv: torch.Tensor,
    heads: Heads,
    angles: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    cache: Cache,
    to: Activations | torch.Tensor,
) -> None:
    cos, sin = angles
    slots, texts = cache.kv.shape[-2], position.numel()
    assert qkv.shape[-1] == heads.width
    assert qkv.numel() == texts * heads.width
    assert qkv.dtype == torch.float32
    width = heads.dim // 2 if cache.bits == 4 else heads.dim
    assert cache.kv.shape[-4:] == (2, heads.kv_heads, slots, width)
    assert cache.kv.numel() == texts * 2 * heads.kv_heads * slots * width
    assert cache.kv.is_contiguous()
    assert cos.shape == sin.shape == (cos.shape[0], heads.rope_dims // 2)
    assert cos.shape[0] >= slots
    assert position.dtype == torch.int64
    n = heads.kv_heads * heads.group * heads.dim
    if isinstance(to, torch.Tensor):
        assert to.shape == (texts, n)
        assert to.dtype == torch.float32
    else:
        assert (to.tokens, to.planes.k) == (texts, n)
