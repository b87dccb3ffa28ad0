"""Activations as planes, against float64: see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.runtime.kernels import planes
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.planes.reference import rms_norm, value

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
Error = Callable[[torch.Tensor, torch.Tensor], float]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("k", "bits"), [(576, 4), (1009, 8), (4304, 3)])
def test_norm(k: int, bits: int, relative_error: Error) -> None:
    x, weight = 30 * normal(k), normal(k, seed=2)
    to = Normed(Activations.empty(k, bits, DEVICE, eps=1e-5), weight)
    planes.norm(x, to)
    assert relative_error(value(to.to), rms_norm(x, weight, 1e-5)) <= 5e-5


@pytest.mark.parametrize(("k", "bits"), [(96, 3), (1009, 4)])
def test_embed(k: int, bits: int, relative_error: Error) -> None:
    table, weight = normal(5, k).bfloat16(), normal(k, seed=2)
    x = torch.empty(k, device=DEVICE)
    to = Normed(Activations.empty(k, bits, DEVICE, eps=1e-5), weight)
    for token in (0, 4):
        planes.embed(torch.tensor([token], device=DEVICE), table, x, to)
        assert torch.equal(x, table[token].float())
        assert relative_error(value(to.to), rms_norm(x, weight, 1e-5)) <= 5e-5


@pytest.mark.parametrize(("k", "bits"), [(160, 8), (1009, 3)])
def test_plain(k: int, bits: int, relative_error: Error) -> None:
    x, to = normal(k), Activations.empty(k, bits, DEVICE)
    planes.plain(x, to)
    assert relative_error(value(to), x.double()) <= 5e-5


def test_what_is_broken_stays_broken() -> None:
    x = normal(96)
    x[40] = float("nan")
    to = Normed(Activations.empty(96, 4, DEVICE, eps=1e-5), normal(96))
    planes.norm(x, to)
    assert bool(value(to.to).isnan().all())


@pytest.mark.parametrize(("k", "bits", "block"), [(576, 4, 128), (200, 8, 64)])
def test_several_tokens(k: int, bits: int, block: int, relative_error: Error) -> None:
    table, weight = normal(5, k).bfloat16(), normal(k, seed=2)
    token, x = torch.tensor([4, 0, 4], device=DEVICE), torch.empty(3, k, device=DEVICE)
    embedded, again = (
        Normed(Activations.empty(k, bits, DEVICE, eps=1e-5, tokens=3, block=block), weight) for _ in range(2)
    )
    planes.embed(token, table, x, embedded)
    assert torch.equal(x, table[token].float())
    planes.norm(x, again)
    to = Activations.empty(k, bits, DEVICE, tokens=3, block=block)
    planes.plain(x, to)
    for i in range(3):
        assert relative_error(value(embedded.to, i), rms_norm(x[i], weight, 1e-5)) <= 5e-5
        assert torch.equal(value(again.to, i), value(embedded.to, i))
        assert relative_error(value(to, i), x[i].double()) <= 5e-5
