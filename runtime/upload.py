"""From a mapped file to a GPU: through pinned buffers, the copy to the GPU of one while the next is read.

A copy from pageable memory is staged by the driver, on one thread, and waits for itself. Here torch's threads read the
mapped pages, each its share of a chunk, while the GPU fetches the chunk before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

CHUNK = 16 << 20  # bytes; pinning takes half a millisecond a MB, and each chunk 0.1 ms of Python
SLOTS = 4  # chunks that are read, waiting or on their way

Join = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class Done(Protocol):
    """A copy that was begun."""

    def synchronize(self) -> None:
        """Wait for its end."""
        ...


Copy = Callable[[torch.Tensor, torch.Tensor], Done]


def joiner(device: torch.device) -> Join:
    """How matrices get to ``device``, rows one after the other: on the CPU a single one stays where it is, mapped."""
    return Staging(device).join if device.type == "cuda" else joined


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows one after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass
class _Slot:
    buffer: torch.Tensor
    done: Done | None = None


class Staging:
    """A ring of pinned buffers, made when they are first needed. Not for several threads at once."""

    def __init__(
        self, device: torch.device, *, chunk: int = CHUNK, slots: int = SLOTS, copy: Copy | None = None
    ) -> None:
        """``copy`` begins to copy its second argument to its first, in order: by default on the current stream."""
        self._device, self._chunk, self._count = device, chunk, slots
        self._copy = copy or _copy_on_stream
        self._slots: list[_Slot] = []
        self._next = 0

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Matrices of one width, or vectors, rows one after the other, on the device.

        When this returns the sources have been read; the result is complete for what the current stream does next.
        """
        if all(part.device.type == self._device.type and not part.is_cpu for part in parts):
            return joined(parts)
        first = parts[0]
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        target = torch.empty(shape, dtype=first.dtype, device=self._device)
        row = 0
        for part in parts:
            self._move(part, target[row : row + part.shape[0]])
            row += part.shape[0]
        return target

    def finish(self) -> None:
        """Wait for all copies."""
        for slot in self._slots:
            if slot.done is not None:
                slot.done.synchronize()
                slot.done = None

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if not source.numel():
            return
        read, written = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (source, target))
        for start in range(0, read.numel(), self._chunk):
            part = read[start : start + self._chunk]
            slot = self._slot()
            staged = slot.buffer[: part.numel()]
            staged.copy_(part)  # by all of torch's threads
            slot.done = self._copy(written[start : start + part.numel()], staged)

    def _slot(self) -> _Slot:
        """The buffer that was used longest ago, free again."""
        if len(self._slots) < self._count:
            pin = self._device.type == "cuda"
            self._slots.append(_Slot(torch.empty(self._chunk, dtype=torch.uint8, pin_memory=pin)))
            return self._slots[-1]
        slot = self._slots[self._next]
        self._next = (self._next + 1) % self._count
        if slot.done is not None:
            slot.done.synchronize()
        return slot


def _copy_on_stream(target: torch.Tensor, source: torch.Tensor) -> Done:
    target.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return done
