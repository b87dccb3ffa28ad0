"""What kernels are shaped by: the GPU that tensors are on, or that tensors without memory stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

LEAST_SHARED = 99 << 10  # bytes of shared memory that a program can have on sm_86, 89 and 120


@dataclass(frozen=True)
class Gpu:
    """``name``: as torch has it; ``shared_memory``: bytes that a program can have."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int = LEAST_SHARED


_meant: ContextVar[Gpu | None] = ContextVar("meant", default=None)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that ``device`` is, or that ``meta`` means; None for a CPU, where kernels are interpreted."""
    return _meant.get() if device.type == "meta" else _described(device)


@contextmanager
def meaning(gpu: Gpu) -> Iterator[None]:
    """Tensors on ``meta`` stand for some on ``gpu``, in this thread."""
    before = _meant.set(gpu)
    try:
        yield
    finally:
        _meant.reset(before)


@cache
def _described(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count, shared)
