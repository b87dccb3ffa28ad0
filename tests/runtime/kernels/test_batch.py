"""A few tokens' product on tensor cores, against float64: see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import PackedWeight
from lbq.runtime.kernels import gemv
from lbq.runtime.kernels import planes as plane_kernels
from lbq.runtime.kernels.batch import BatchTile, batch, planes, product, tile_codes, tile_for, why_not
from lbq.runtime.kernels.gemv import reference
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.planes.reference import rms_norm, value
from lbq.runtime.kernels.project import arrivals

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if INTERPRETED else "cuda"
BOUND = 2e-4
Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]
CASES = [(4, 256, 128, 3), (4, 419, 419, 2), (8, 128, 64, 16), (8, 200, 200, 5), (4, 272, 272, 1)]
CASES += [(4, 320, 64, 5), (4, 160, 32, 2), (8, 160, 32, 3)]  # groups of a half and a quarter of a tile
if not INTERPRETED:
    CASES += [(bits, k, k, m) for bits in (4, 8) for k in (1536, 4304, 14336) for m in (1, 2, 4, 7, 8, 16)]
    CASES += [(4, 4096, group, m) for group in (32, 64, 256) for m in (1, 2, 4, 7, 8, 16)]
TILES = [BatchTile(1), BatchTile(2, 2, 2), BatchTile(1, 1, 1, rows=2)]
if not INTERPRETED:
    TILES += [
        BatchTile(8),
        BatchTile(4, 4, 2),
        BatchTile(1, 8),
        BatchTile(4, 1, 4),
        BatchTile(2, 2, 1, rows=2),
    ]


@pytest.mark.parametrize(("bits", "k", "group", "m"), CASES)
def test_against_float64(bits, k: int, group: int, m: int, random_weight: Weights, relative_error: Error) -> None:
    for n in (21,) if INTERPRETED else (21, 1024):
        weight = random_weight(n, k, bits, group, DEVICE)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for tile in TILES:
            y = batch(planes(x, bits), gemv.arrange(weight), bias, tile=tile)
            assert y.shape == (m, n)
            assert relative_error(y, reference.gemv(x, weight, bias)) <= BOUND


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_do_not_see_each_other(bits: int, random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(16, 256, bits, 128, DEVICE))
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1] *= 1e6
    together = batch(planes(x, bits), weight)
    alone = torch.cat([batch(planes(x[i : i + 1], bits), weight) for i in range(6)])
    assert torch.equal(together, alone)


def test_what_is_broken_stays_with_its_token(random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(16, 256, 4, 128, DEVICE))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1, 200] = float("nan")
    y = batch(planes(x, 4), weight)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]
    assert bool(y[1].isnan().all())


def test_rule_and_refusals(random_weight: Weights) -> None:
    def rule(n: int, k: int, bits: int, group: int, tokens: int) -> BatchTile:
        words = torch.empty((n, 0), device="meta")
        return tile_for(gemv.ArrangedWeight(words, words, bits, group, k), tokens, 132)

    four = [rule(n, k, 4, 256, 4) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))]
    assert four == [BatchTile(4, 1, 4), BatchTile(8, 2, 4), BatchTile(1, 4, 2), BatchTile(8, 1, 2)]
    eight = [rule(n, k, 4, 256, 8) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))]
    assert eight == [BatchTile(4, 1, 2, 2), BatchTile(8, 1, 2, 2), BatchTile(1, 4, 2, 2), BatchTile(8, 1, 2, 2)]
    assert rule(128256, 4096, 8, 4096, 4) == BatchTile(1, 4, 4)
    assert rule(1024, 100, 4, 100, 2) == BatchTile(1, 4, 4)
    assert rule(4096, 4096, 4, 32, 8) == BatchTile(8, 2, 1)  # more parts a tile than registers for more
    assert rule(4096, 4096, 4, 256, 16) == BatchTile(8, 1, 1, 2)
    assert rule(4096, 4096, 4, 32, 16) == BatchTile(8, 1, 1)  # sixteen warps would spill
    assert why_not(gemv.arrange(random_weight(4, 192, 3, 64, DEVICE))) == "3-bit codes"
    assert "groups of 48" in str(why_not(gemv.arrange(random_weight(4, 192, 4, 48, DEVICE))))
    for bits, group in ((4, 64), (4, 32), (8, 64), (8, 32)):
        assert why_not(gemv.arrange(random_weight(4, 192, bits, group, DEVICE))) is None


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def room(k: int, bits: int, tokens: int, eps: float | None = None) -> Activations:
    return Activations.empty(k, bits, torch.device(DEVICE), eps=eps, tokens=tokens, block=tile_codes(bits))


# Blocks of 128 or 64 outputs: shared by programs, or owned, or written by a launch of their own.
WAYS = [BatchTile(2), BatchTile(1, 8), BatchTile(1, 4, 2, rows=2)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("bits", "to_bits", "tile"), [(4, 4, WAYS[0]), (4, 8, WAYS[2]), (8, 4, WAYS[1])])
def test_added_to_the_stream(bits, to_bits, tile, apart: bool, random_weight: Weights, relative_error: Error) -> None:
    m, n, k = 5, 200, 192
    weight, x, w = random_weight(n, k, bits, 64, DEVICE), normal(m, k), normal(n, seed=3)
    bias, stream, source = normal(n, seed=4), normal(m, n, seed=5), room(k, bits, m)
    plane_kernels.plain(x, source)
    expected = stream.double() + reference.gemv(x, weight, bias)
    to, counters = Normed(room(n, to_bits, m, 1e-6), w), arrivals(n, torch.device(DEVICE))
    product(
        source,
        gemv.arrange(weight),
        bias,
        stream,
        kind="add",
        tile=tile,
        to=None if apart else to,
        counters=counters,
    )
    if apart:
        plane_kernels.norm(stream, to)
    assert not counters.any()
    assert relative_error(stream, expected) <= BOUND
    for i in range(m):
        assert relative_error(value(to.to, i), rms_norm(expected[i], w, 1e-6)) <= BOUND


@pytest.mark.parametrize("tile", [BatchTile(2), BatchTile(1, 8), BatchTile(1, 8, rows=2)])
def test_gated(tile: BatchTile, random_weight: Weights, relative_error: Error) -> None:
    m, n, k = 3, 200, 256
    weight, x, w = random_weight(2 * n, k, 4, 128, DEVICE), normal(m, k), normal(k, seed=2)
    bias = normal(2 * n, seed=4)
    normed, y, to = Normed(room(k, 4, m, 1e-5), w), torch.empty(m, n, device=DEVICE), room(n, 4, m)
    plane_kernels.norm(x, normed)
    counters = arrivals(n, torch.device(DEVICE))
    product(normed.to, gemv.arrange(weight), bias, y, kind="gated", tile=tile, to=to, counters=counters)
    gate, up = reference.gemv(rms_norm(x, w, 1e-5), weight, bias).split(n, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    assert not counters.any()
    assert relative_error(y, expected) <= BOUND
    for i in range(m):
        assert relative_error(value(to, i), expected[i]) <= BOUND


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no races")
def test_repeats_are_bit_identical(random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(1003, 4096, 4, 256, DEVICE))
    x = planes(torch.randn(16, 4096, device=DEVICE), 4)
    first = batch(x, weight)
    for _ in range(50):
        assert torch.equal(batch(x, weight), first)
