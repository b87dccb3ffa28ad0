"""One token's attention against float64: see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from lbq.runtime.cache import PACKED, opened, packed
from lbq.runtime.kernels.attention import (
    Cache,
    Heads,
    Norms,
    Scratch,
    Short,
    Split,
    attend,
    attend_short,
    reference,
    serves_short,
    split_for,
    why_not,
    writes_planes,
)
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations
from lbq.runtime.kernels.planes.reference import value
from lbq.runtime.turn import Turn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SPLIT = Split(splits=3, block=16, least=16)
Error = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Text:
    """One layer's attention over a text: slots that nobody wrote hold NaN, as poison does."""

    heads: Heads
    cache: Cache
    split: Split
    norms: Norms | None
    angles: tuple[torch.Tensor, torch.Tensor]
    random: torch.Generator
    bits: int = 4
    short: Short | None = None

    @staticmethod
    def make(
        heads: Heads,
        slots: int,
        *,
        split: Split = SPLIT,
        norm: bool = False,
        dtype=torch.float16,
        bits: int = 4,
        short: Short | None = None,
    ):
        random = torch.Generator().manual_seed(heads.dim + heads.group)
        few = dtype in PACKED
        shape = (2, heads.kv_heads, slots, heads.dim // 2 if dtype == torch.uint8 else heads.dim)
        kv = torch.full(shape, 0 if few else float("nan"), dtype=dtype)
        scales = torch.full(kv.shape[:3], float("nan")) if few else None
        angle = torch.arange(slots)[:, None] * torch.rand(heads.rope_dims // 2, generator=random)
        weight = torch.randn(heads.dim, generator=random)
        return Text(
            heads,
            Cache(kv.to(DEVICE)) if scales is None else Cache(kv.to(DEVICE), scales.to(DEVICE), turn(heads, random)),
            split,
            Norms(weight.to(DEVICE), 1e-6) if norm else None,
            (angle.cos().to(DEVICE), angle.sin().to(DEVICE)),
            random,
            bits,
            short,
        )

    def fill(self, length: int) -> None:
        """Tokens 0 to length − 1, keys and values as if they had been stored one by one."""
        shape = (2, self.heads.kv_heads, length, self.heads.dim)
        new = torch.randn(shape, generator=self.random).to(DEVICE)
        if self.cache.scales is None:
            self.cache.kv[:, :, :length] = new
        else:
            codes, scales = packed(new, self.cache.turn, self.cache.kv.dtype)
            self.cache.kv[:, :, :length], self.cache.scales[:, :, :length] = codes, scales

    def run(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernel makes of a new random token, and what float64 makes of it: [heads · dim] each."""
        heads = self.heads
        qkv = torch.randn(heads.width, generator=self.random).to(DEVICE)
        to = Activations.empty(heads.kv_heads * heads.group * heads.dim, self.bits, DEVICE)
        scratch = Scratch.empty(heads, self.split, DEVICE)
        at = torch.tensor([position], device=DEVICE)
        args = (qkv, heads, self.norms, self.norms, self.angles, at, self.cache)
        if self.short is None:
            attend(*args, scratch, self.split, to)
        else:
            scratch = Scratch.empty_short(heads, self.short, DEVICE)
            attend_short(*args, scratch, self.short, to)
        assert not scratch.counters.any()
        q, k, v = reference.new_entry(
            qkv, heads, self.norms, self.norms, self.angles[0][position], self.angles[1][position]
        )
        keys, values = self.seen(position + 1)
        if self.cache.turn is None:
            tolerance = 2e-3 if self.cache.kv.dtype == torch.float16 else 1e-2
            torch.testing.assert_close(keys[:, -1], k, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(values[:, -1], v, rtol=tolerance, atol=tolerance)
        else:
            codes, scales = packed(torch.stack((k, v))[:, :, None].float(), self.cache.turn, self.cache.kv.dtype)
            torch.testing.assert_close(self.cache.scales[:, :, position], scales[:, :, 0], rtol=2e-3, atol=0)
            assert furthest(self.cache.kv[:, :, position], codes[:, :, 0]) <= 1
        return value(to), reference.attend(q, keys, values, heads)

    def seen(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values float64 [kv_heads, length, dim] as the cache holds them."""
        kv = self.cache.kv[:, :, :length]
        if self.cache.turn is not None:
            return opened(kv, self.cache.scales[:, :, :length].double(), self.cache.turn)
        return kv[0].double(), kv[1].double()


def furthest(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest difference of two codes."""
    if a.dtype == torch.int8:
        return int((a.int() - b.int()).abs().max())
    return max(int(((a.int() >> s & 15) - (b.int() >> s & 15)).abs().max()) for s in (0, 4))


def turn(heads: Heads, random: torch.Generator) -> Turn:
    """Units that are far apart."""
    return Turn.of((2 * torch.randn(heads.kv_heads, heads.dim, generator=random)).exp2().to(DEVICE))


def heads_of(kv_heads: int, group: int, dim: int, *, rope: int | None = None, window: int | None = None) -> Heads:
    return Heads(kv_heads, group, dim, rope or dim, dim**-0.5, window)


SHAPES = [
    heads_of(2, 4, 128),
    heads_of(1, 3, 64),
    heads_of(1, 1, 96),
    heads_of(1, 7, 128, rope=64),
    heads_of(1, 20, 64),
]
# The interpreter takes a tenth of a second a program.
POSITIONS = (0, 17, 99) if INTERPRETED else (0, 1, 15, 16, 17, 47, 48, 99)
WINDOWS = [(3, 1), (4, 5), (8, 40)] if INTERPRETED else [(bits, n) for bits in (3, 4, 8) for n in (1, 5, 16, 40)]


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_against_float64(heads: Heads, relative_error: Error) -> None:
    text = Text.make(heads, 128, norm=heads.dim == 128)
    text.fill(100)
    for position in POSITIONS:
        assert relative_error(*text.run(position)) <= 1e-3


SHORTS = [Short(block=32, warps=1, parts=2), Short(block=64, warps=4, parts=1), Short(block=32, warps=4, parts=4)]


@pytest.mark.parametrize("heads", [h for h in SHAPES if serves_short(h)], ids=str)
def test_short_texts(heads: Heads, relative_error: Error) -> None:
    for short in SHORTS:
        text = Text.make(heads, 128, norm=heads.dim == 128, short=short)
        text.fill(100)
        for position in POSITIONS:
            assert relative_error(*text.run(position)) <= 1e-4


@pytest.mark.parametrize("short", [Short(4096, 16, 1, 32), Short(4096, 32, 2, 8), Short()], ids=str)
def test_the_longest_short_texts(short: Short, relative_error: Error) -> None:
    """Those of one text on an H200, of several, and of the rule: each part goes through many blocks."""
    text = Text.make(heads_of(1, 2, 128), short.until, short=short)
    text.fill(short.until - 1)
    for position in (short.until // 3, short.until - 1):
        assert relative_error(*text.run(position)) <= 1e-4


@pytest.mark.parametrize("short", [None, SHORTS[2]])
@pytest.mark.parametrize(("bits", "window"), WINDOWS)
def test_windows(bits: int, window: int, short: Short | None, relative_error: Error) -> None:
    text = Text.make(heads_of(1, 2, 64, window=window), 96, bits=bits, short=short)
    text.fill(90)
    for position in (3, 40, 89):
        text.cache.kv[:, :, : max(0, position + 1 - window)] = float("nan")  # what is past the window is not read
        assert relative_error(*text.run(position)) <= 1e-3


@pytest.mark.parametrize("norm", [False, True])
def test_norm_and_partial_rope(norm: bool, relative_error: Error) -> None:
    text = Text.make(heads_of(1, 2, 64, rope=32), 64, norm=norm)
    text.fill(40)
    assert relative_error(*text.run(40)) <= 1e-3


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        pytest.param(
            torch.bfloat16, 1e-2, marks=pytest.mark.skipif(INTERPRETED, reason="it multiplies bfloat16's bits")
        ),
        (torch.int8, 1e-3),
        (torch.uint8, 2e-3),
    ],
)
@pytest.mark.parametrize("heads", [heads_of(2, 3, 64), heads_of(1, 20, 96), heads_of(1, 2, 32)], ids=str)
def test_other_caches(heads: Heads, dtype: torch.dtype, bound: float, relative_error: Error) -> None:
    text = Text.make(heads, 96, dtype=dtype, norm=heads.dim == 96)
    text.fill(80)
    for position in (0, 80):
        assert relative_error(*text.run(position)) <= bound


OTHERS = [heads_of(1, 2, 256), heads_of(1, 7, 128, rope=64), heads_of(2, 1, 96, window=33)]


@pytest.mark.parametrize("heads", OTHERS, ids=str)
def test_int8_of_other_heads(heads: Heads, relative_error: Error) -> None:
    text = Text.make(heads, 96, norm=heads.dim == 128, dtype=torch.int8)
    text.fill(80)
    for position in (0, 80):
        assert relative_error(*text.run(position)) <= 2e-3


@pytest.mark.parametrize("split", [Split(1, 16, 16), Split(4, 32, 64, 3, 2), Split(32, 64, 64, 2, 4)], ids=str)
def test_splits_agree(split: Split, relative_error: Error) -> None:
    text = Text.make(heads_of(1, 2, 64), 400, split=split)
    text.fill(390)
    for position in (64, 389):
        assert relative_error(*text.run(position)) <= 1e-3


def test_scores_far_apart(relative_error: Error) -> None:
    text = Text.make(heads_of(1, 2, 64), 96)
    text.fill(90)
    text.cache.kv[0, :, 20] *= 300  # one token takes all the weight
    assert relative_error(*text.run(90)) <= 1e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("short", [None, SHORTS[2]])
def test_what_is_broken_stays_broken(short: Short | None) -> None:
    text = Text.make(heads_of(2, 2, 64), 96, short=short)
    text.fill(90)
    text.cache.kv[0, 1, 20, 3] = float("nan")
    got, _ = text.run(90)
    assert bool(got[128:].isnan().all())
    assert bool(got[:128].isfinite().all())


@pytest.mark.parametrize("short", [None, SHORTS[2]])
@pytest.mark.parametrize(("heads", "block"), [(heads_of(1, 2, 128), 128), (heads_of(2, 3, 64), 0)], ids=str)
def test_several_texts(heads: Heads, block: int, short: Short | None, relative_error: Error) -> None:
    """Of different lengths, into planes of larger blocks, or as they are where heads are no whole blocks."""
    texts = [Text.make(heads, 80, short=short) for _ in range(3)]
    positions = (0, 70, 33)
    for i, (text, position) in enumerate(zip(texts, positions, strict=True)):
        text.random.manual_seed(i)
        text.fill(position)
    cache = Cache(torch.stack([text.cache.kv for text in texts]))
    qkv = torch.randn(3, heads.width, generator=texts[0].random).to(DEVICE)
    n = heads.kv_heads * heads.group * heads.dim
    planes = Activations.empty(n, 4, DEVICE, tokens=3, block=block or 32)
    to = planes if block else torch.empty(3, n, device=DEVICE)
    at, args = torch.tensor(positions, device=DEVICE), (qkv, heads, None, None, texts[0].angles)
    if short is None:
        scratch = Scratch.empty(heads, SPLIT, DEVICE, 3)
        attend(*args, at, cache, scratch, SPLIT, to)
    else:
        scratch = Scratch.empty_short(heads, short, DEVICE, 3)
        attend_short(*args, at, cache, scratch, short, to)
    assert not scratch.counters.any()
    for i, position in enumerate(positions):
        q, *_ = reference.new_entry(qkv[i], heads, None, None, *(x[position] for x in texts[0].angles))
        expected = reference.attend(q, *cache.kv[i, :, :, : position + 1].double(), heads)
        assert relative_error(value(planes, i) if block else to[i], expected) <= 1e-3


def test_rule_and_refusals() -> None:
    assert [writes_planes(heads_of(1, group, 64), 128) for group in (2, 3)] == [True, False]
    assert split_for(heads_of(8, 4, 128), 132) == Split(16, 64, 64, 3)
    assert split_for(heads_of(2, 7, 64), 20, torch.int8) == Split(10, 128, 128, 3)
    assert split_for(heads_of(4, 3, 256), 24) == Split(6, 32, 32, 3)
    assert why_not(heads_of(1, 1, 80)) is not None
    assert why_not(heads_of(1, 2, 512)) is not None
    assert [dim for dim in (32, 80, 96, 256, 288) if serves_short(heads_of(1, 2, dim))] == [32, 96, 256]
    assert Short(block=64, warps=8).fits(heads_of(1, 1, 32)) is True
    assert Short(block=32, warps=8).fits(heads_of(1, 1, 32)) is False


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no races")
@pytest.mark.parametrize(
    ("dtype", "short"),
    [
        (torch.float16, None),
        (torch.float16, Short(block=64, warps=8, parts=8)),
        (torch.int8, None),
        (torch.uint8, None),
    ],
)
def test_repeats_are_bit_identical(dtype: torch.dtype, short: Short | None) -> None:
    text = Text.make(heads_of(8, 4, 128), 2048, dtype=dtype, split=Split(32))
    text.fill(2000)
    qkv = torch.randn(text.heads.width, device=DEVICE)
    at = torch.tensor([1999], device=DEVICE)
    scratch = Scratch.empty(text.heads, text.split, DEVICE)
    if short is not None:
        scratch = Scratch.empty_short(text.heads, short, DEVICE)
    results = []
    for _ in range(50):
        to = Activations.empty(32 * 128, 4, DEVICE)
        args = (qkv, text.heads, None, None, text.angles, at, text.cache)
        if short is None:
            attend(*args, scratch, text.split, to)
        else:
            attend_short(*args, scratch, short, to)
        results.append((to.planes.q, to.planes.scales))
    for q, scales in results[1:]:
        assert torch.equal(q, results[0][0])
        assert torch.equal(scales, results[0][1])
