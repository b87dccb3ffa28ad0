"""Projections and what follows them in one launch, against float64: see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import BITS, PackedWeight
from lbq.runtime.decoder import ACTIVATIONS
from lbq.runtime.kernels import gemv, planes
from lbq.runtime.kernels.gemv import Tile
from lbq.runtime.kernels.gemv import reference as product
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.planes.reference import rms_norm, value
from lbq.runtime.kernels.project import arrivals, project, project_dense

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
WHOLE, SHARED = Tile(64, 128, 8), Tile(16, 512, 4)  # whole blocks of outputs a program, or several programs a block
BOUND = 2e-4
Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def plain(x: torch.Tensor, bits: int) -> Activations:
    to = Activations.empty(x.numel(), bits, DEVICE)
    planes.plain(x, to)
    return to


def counters_of(n: int, tile: Tile) -> torch.Tensor | None:
    return arrivals(n, DEVICE) if tile.rows < 64 else None


@pytest.mark.parametrize(("bits", "group", "biased"), [(3, 64, True), (4, 192, False), (8, 576, True)])
def test_store_of_a_normalised_input(
    bits: int, group: int, biased: bool, random_weight: Weights, relative_error: Error
) -> None:
    weight, x, w = random_weight(70, 576, bits, group, DEVICE), 5 * normal(576), normal(576, seed=2)
    bias = normal(70, seed=3) if biased else None
    normed = Normed(Activations.empty(576, bits, DEVICE, eps=1e-5), w)
    planes.norm(x, normed)
    y = torch.empty(70, device=DEVICE)
    project(normed.to, gemv.arrange(weight), bias, y, kind="store", tile=Tile(16, 512, 4))
    expected = product.gemv(rms_norm(x, w, 1e-5)[None], weight, bias)[0]
    assert relative_error(y, expected) <= BOUND


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", [WHOLE, SHARED], ids=["whole", "shared"])
def test_add(bits: int, tile: Tile, random_weight: Weights, relative_error: Error) -> None:
    n = 70  # the last block holds 6
    weight, x, w = random_weight(n, 192, bits, 64, DEVICE), normal(192), normal(n, seed=2)
    bias, stream = normal(n, seed=3), 3 * normal(n, seed=4)
    expected = stream.double() + product.gemv(x[None], weight, bias)[0]
    to = Normed(Activations.empty(n, 11 - bits if bits != 4 else 4, DEVICE, eps=1e-6), w)  # the next one's bits differ
    counters = counters_of(n, tile)
    args = (plain(x, bits), gemv.arrange(weight), bias, stream)
    project(*args, kind="add", tile=tile, to=to, counters=counters)
    assert relative_error(stream, expected) <= BOUND
    assert relative_error(value(to.to), rms_norm(expected, w, 1e-6)) <= BOUND
    assert counters is None or not counters.any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [192, 576])
def test_early_weights_change_nothing(bits: int, k: int, random_weight: Weights) -> None:
    """One, two and more steps along K."""
    weight, x = gemv.arrange(random_weight(40, k, bits, 64, DEVICE)), plain(normal(k), bits)
    found = []
    for early in (1, 2):
        y = torch.full((40,), float("nan"), device=DEVICE)
        project(x, weight, None, y, kind="store", tile=Tile(16, 32, 2), early=early)
        found.append(y)
    assert torch.equal(*found)
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tile", [WHOLE, SHARED], ids=["whole", "shared"])
def test_gated(activation, tile: Tile, random_weight: Weights, relative_error: Error) -> None:
    n = 45
    weight, x = random_weight(2 * n, 192, 4, 32, DEVICE), 3 * normal(192)
    bias = normal(2 * n, seed=3)
    gate, up = product.gemv(x[None], weight, bias)[0].split(n)
    expected = ACTIVATIONS[activation](gate) * up
    y, to = torch.empty(n, device=DEVICE), Activations.empty(n, 8, DEVICE)
    options = {"kind": "gated", "tile": tile, "activation": activation}
    args = plain(x, 4), gemv.arrange(weight), bias, y
    project(*args, **options, to=to, counters=counters_of(n, tile))
    assert relative_error(value(to), expected) <= BOUND
    y.fill_(float("nan"))
    project(*args, **options)
    assert relative_error(y, expected) <= BOUND


@pytest.mark.parametrize("biased", [False, True])
def test_dense(biased: bool, relative_error: Error) -> None:
    weight, x, w = normal(33, 1100).bfloat16(), 4 * normal(1100), normal(1100, seed=2)
    bias, y = normal(33, seed=3) if biased else None, torch.empty(33, device=DEVICE)
    normed = Normed(Activations.empty(1100, 8, DEVICE, eps=1e-5), w)
    planes.norm(x, normed)
    project_dense(x, w, normed.to.squares, 1e-5, weight, bias, y, rows=16)
    expected = weight.double() @ rms_norm(x, w, 1e-5)
    assert relative_error(y, expected if bias is None else expected + bias.double()) <= 1e-6


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no races")
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_repeats_are_bit_identical(rows: int, random_weight: Weights) -> None:
    n = 4096
    weight, x = gemv.arrange(random_weight(n, 4096, 4, 256, DEVICE)), plain(normal(4096), 4)
    w, counters = normal(n), arrivals(n, DEVICE)
    found = []
    for _ in range(50):
        to, stream = Normed(Activations.empty(n, 4, DEVICE, eps=1e-6), w), normal(n, seed=5)
        project(x, weight, None, stream, kind="add", tile=Tile(rows, 128, 1), to=to, counters=counters)
        found.append((stream, to.to.planes.q, to.to.planes.scales, to.to.squares))
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("rounds", [2, 4, 8])
def test_whole_rows_past_resident_activations(
    bits: int, rows: int, rounds: int, random_weight: Weights, relative_error: Error
) -> None:
    """Programs of 4 to 64 rows: several a block of 32 outputs, or whole blocks."""
    n, k = 70, 480
    tile = Tile(rows, 128, 1, rounds)
    weight, x, w = random_weight(n, k, bits, 96, DEVICE), 0.1 * normal(k), normal(n, seed=2)
    bias, stream, arranged = normal(n, seed=3), 3 * normal(n, seed=4), gemv.arrange(weight)
    expected = stream.double() + product.gemv(x[None], weight, bias)[0]
    to = Normed(Activations.empty(n, 4, DEVICE, eps=1e-6), w)
    project(plain(x, bits), arranged, bias, stream, kind="add", tile=tile, to=to, counters=arrivals(n, DEVICE))
    assert relative_error(stream, expected) <= BOUND
    assert relative_error(value(to.to), rms_norm(expected, w, 1e-6)) <= BOUND
    gate, up = product.gemv(x[None], weight, bias)[0].split(n // 2)
    y, to = torch.full((n // 2,), float("nan"), device=DEVICE), Activations.empty(n // 2, 8, DEVICE)
    counters = arrivals(n // 2, DEVICE)
    project(plain(x, bits), arranged, bias, y, kind="gated", tile=tile, to=to, counters=counters)
    expected = torch.nn.functional.silu(gate) * up
    assert relative_error(y, expected) <= BOUND
    assert relative_error(value(to), expected) <= BOUND
    assert not counters.any()
