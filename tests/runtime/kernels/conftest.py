"""What the tests of the kernels share: random packed weights, and memory that is never accidentally right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import PackedWeight, pack


@pytest.fixture
def random_weight() -> Callable[..., PackedWeight]:
    """Codes over the whole range and scales of both signs: ``random_weight(n, k, bits, group, device)``."""

    def make(n: int, k: int, bits: int, group: int, device: str = "cpu", seed: int = 0) -> PackedWeight:
        generator = torch.Generator().manual_seed(seed + n * 7 + k * 11 + bits)
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
        scales = torch.randn(n, k // group, generator=generator).mul(0.02).bfloat16()
        return PackedWeight(pack(codes, bits).to(device), scales.to(device), bits, group, k)

    return make


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or 0x7f bytes, so that whatever a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned_empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def _relative_error(y: torch.Tensor, y64: torch.Tensor) -> float:
    assert y.shape == y64.shape
    return float((y.double() - y64).norm() / y64.norm())


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """‖y − y64‖ / ‖y64‖; NaN if y holds one, which fails every ``<=``."""
    return _relative_error
