"""The matrix-vector kernels against float64: on a GPU over the whole grid, under Triton's interpreter over a thin one.

``test_interpreted.py`` runs this file under the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import BITS, GROUPS, PackedWeight
from lbq.runtime.kernels import gemv
from lbq.runtime.kernels.gemv import Tile, reference
from lbq.runtime.kernels.gemv.triton import INTERPRETED

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
WIDTHS = (192, 576, 896, 1009, 1536, 4096, 4304, 4864, 14336)  # 1009 is prime; 32 does not divide 4304
# Triton's interpreter cuts float32 to bfloat16, a GPU rounds.
BOUND = {torch.float32: 2e-4, torch.float16: 5e-4, torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3}
WIDE = [(128, 1), (256, 2), (512, 4), (1024, 8)]  # columns and warps
NARROW = [(32, 2), (32, 4), (64, 4), (64, 8), (128, 8)]
# Few programs for the interpreter, which runs them one by one; elsewhere the rule's own tile.
TILE = Tile(8, 512, 4) if INTERPRETED else None

Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]


def _groups(k: int) -> list[int]:
    return [g for g in GROUPS if k % g == 0] + [k]


def _grid() -> list[tuple[int, int, int]]:
    """(bits, K, group): all of them, or under the interpreter one group a width, another one at each width."""
    if not INTERPRETED:
        return [(bits, k, group) for bits in BITS for k in WIDTHS for group in _groups(k)]
    return [
        (bits, k, _groups(k)[(i + j) % len(_groups(k))]) for i, bits in enumerate(BITS) for j, k in enumerate(WIDTHS)
    ]


def _activations(m: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("k", [192, 1009, 4304])
@pytest.mark.usefixtures("poisoned")
def test_planes_of_three_bits_hold_the_codes(k: int, random_weight: Weights) -> None:
    weight = random_weight(5, k, 3, k)
    arranged = gemv.arrange(PackedWeight(weight.words.to(DEVICE), weight.scales.to(DEVICE), 3, k, k))
    assert torch.equal(arranged.words.cpu(), reference.split_planes(weight.words, k))
    assert arranged.nbytes <= weight.nbytes + 5 * 12  # at most one word more in each run


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [192, 1009])
@pytest.mark.usefixtures("poisoned")
def test_activation_planes_keep_sixteen_bits(bits: int, k: int) -> None:
    x = _activations(3, k)
    x[0, 5], x[1, :40], x[2, 64:96] = 3e4, 0.0, 1e-33
    planes = gemv.quantize(x, bits)
    blocks = torch.nn.functional.pad(x, (0, -k % 32)).double().view(3, -1, 32)
    kept = reference.activations(planes.q, planes.scales, bits, blocks.shape[1] * 32).view(3, -1, 32)
    bound = blocks.abs().amax(dim=2, keepdim=True) * (1.001 / 64516) + 1e-30
    assert bool(((kept - blocks).abs() <= bound).all())
    columns = blocks.shape[1] * 32 // (4 * planes.q.shape[2])
    assert not planes.q[:, :, :, columns:].any()


@pytest.mark.parametrize(("bits", "k", "group"), _grid())
@pytest.mark.usefixtures("poisoned")
def test_against_float64(bits: int, k: int, group: int, random_weight: Weights, relative_error: Error) -> None:
    for n in (7,) if INTERPRETED else (17, 257, 1024):
        weight = random_weight(n, k, bits, group, DEVICE)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        x = _activations(1, k)
        y = gemv.gemv(gemv.quantize(x, bits), gemv.arrange(weight), bias, tile=TILE)
        assert y.dtype == torch.float32
        assert relative_error(y, reference.gemv(x, weight, bias)) <= BOUND[torch.float32]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", list(BOUND))
def test_types_of_input_and_output(
    bits: int, dtype: torch.dtype, random_weight: Weights, relative_error: Error
) -> None:
    weight = random_weight(65, 192, bits, 64, DEVICE)
    x = _activations(1, 192).to(dtype)
    y = torch.full((1, 65), float("nan"), dtype=dtype, device=DEVICE)
    gemv.gemv(gemv.quantize(x, bits), gemv.arrange(weight), out=y, tile=TILE)
    assert relative_error(y, reference.gemv(x, weight)) <= BOUND[dtype]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [3] if INTERPRETED else [2, 3, 8, 16])
def test_tokens_do_not_see_each_other(bits: int, m: int, random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(9, 896, bits, 128, DEVICE))
    x = _activations(m, 896)
    together = gemv.gemv(gemv.quantize(x, bits), weight, tile=TILE)
    alone = [gemv.gemv(gemv.quantize(x[i : i + 1], bits), weight, tile=TILE) for i in range(m)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 8] if INTERPRETED else [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("columns", "warps"), [(32, 2), (1024, 8)] if INTERPRETED else WIDE + NARROW)
@pytest.mark.usefixtures("poisoned")
def test_every_tile(
    bits: int, rows: int, columns: int, warps: int, random_weight: Weights, relative_error: Error
) -> None:
    weight = random_weight(5, 1536, bits, 256, DEVICE)
    x = _activations(1, 1536)
    y = gemv.gemv(gemv.quantize(x, bits), gemv.arrange(weight), tile=Tile(rows, columns, warps))
    assert relative_error(y, reference.gemv(x, weight)) <= BOUND[torch.float32]


@pytest.mark.parametrize("bits", BITS)
def test_outliers_spoil_their_own_block_only(bits: int, random_weight: Weights, relative_error: Error) -> None:
    weight = random_weight(16, 576, bits, 64, DEVICE)
    x = _activations(1, 576)
    x[0, 96:128] *= 1e4
    arranged, without = gemv.arrange(weight), x.clone()
    without[0, 96:128] = 0
    planes = gemv.quantize(x, bits)
    assert relative_error(gemv.gemv(planes, arranged, tile=TILE), reference.gemv(x, weight)) <= BOUND[torch.float32]
    planes.scales[0, 3] = 0
    assert (
        relative_error(gemv.gemv(planes, arranged, tile=TILE), reference.gemv(without, weight)) <= BOUND[torch.float32]
    )


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_nans(bits: int, random_weight: Weights) -> None:
    weight = random_weight(6, 192, bits, 64, DEVICE)
    weight.scales[2] = 0
    arranged = gemv.arrange(weight)
    bias = torch.arange(6, dtype=torch.float32, device=DEVICE)
    x = _activations(1, 192)
    assert gemv.gemv(gemv.quantize(x, bits), arranged, bias, tile=TILE)[0, 2] == 2
    assert torch.equal(gemv.gemv(gemv.quantize(torch.zeros_like(x), bits), arranged, bias, tile=TILE)[0], bias)
    for bad in (float("nan"), float("inf")):
        x[0, 70] = bad
        y = gemv.gemv(gemv.quantize(x, bits), arranged, bias, tile=TILE)
        assert bool(y.isnan().all())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no races")
@pytest.mark.parametrize("bits", BITS)
def test_repeats_are_bit_identical(bits: int, random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(1003, 4096, bits, 256, DEVICE))
    x = _activations(4, 4096)
    first = gemv.gemv(gemv.quantize(x, bits), weight)
    for _ in range(50):
        assert torch.equal(gemv.gemv(gemv.quantize(x, bits), weight), first)
