"""From a mapped file to a GPU: threads read its pages into pinned buffers, and the GPU fetches these meanwhile.

A copy from pageable memory is staged by the driver, on one thread, and waits for itself. Here each piece of a matrix is
read by whichever thread is free; none of them holds Python's lock while it does so, nor waits for another.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

import torch

CHUNK = 4 << 20  # bytes of a buffer, and of a piece
THREADS = min(8, os.cpu_count() or 1)
SLOTS = 12  # buffers that are read into, waiting or on their way; pinning takes half a millisecond a MB

Arriving = Callable[[], torch.Tensor]  # waits for a matrix that was begun to move


class Mover(Protocol):
    """How weights get to a device."""

    def begin(self, parts: Sequence[torch.Tensor], release: Callable[[], None]) -> Arriving:
        """Begin to move matrices of one width, or vectors: rows one after the other.

        ``release`` is called, perhaps by another thread, where they were copied to another device and have been read.
        """
        ...

    def close(self) -> None:
        """Nothing is begun any more, and what was begun and not waited for is not wanted."""
        ...


class Done(Protocol):
    """A copy that was begun."""

    def query(self) -> bool:
        """Whether it has ended."""
        ...

    def synchronize(self) -> None:
        """Wait for its end."""
        ...


Copy = Callable[[torch.Tensor, torch.Tensor], Done]


def mover(device: torch.device) -> Mover:
    """How weights get to ``device``."""
    return Staging(device) if device.type == "cuda" else InPlace()


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows one after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class InPlace:
    """On the CPU: a single matrix stays where it is, mapped; several are joined once they are asked for."""

    def begin(self, parts: Sequence[torch.Tensor], release: Callable[[], None]) -> Arriving:  # noqa: ARG002
        return partial(joined, parts)

    def close(self) -> None:
        """Nothing is on its way."""


@dataclass
class _Slot:
    buffer: torch.Tensor
    done: Done | None = None


class Staging:
    """Threads, and a ring of pinned buffers, made when they are first needed."""

    def __init__(
        self,
        device: torch.device,
        *,
        chunk: int = CHUNK,
        slots: int = SLOTS,
        threads: int = THREADS,
        copy: Copy | None = None,
    ) -> None:
        """``copy`` begins to copy its second argument to its first, in order: by default on the current stream."""
        self._device, self._chunk, self._most = device, chunk, slots
        self._copy = _copy_on_stream if copy is None else copy
        self._used: deque[_Slot] = deque()  # the one used longest ago first
        self._made, self._lock = 0, Lock()
        threads = min(threads, slots)  # so that a thread finds a buffer that no other fills
        self._threads = (
            ThreadPoolExecutor(threads, "upload", torch.cuda.set_stream, (torch.cuda.current_stream(device),))
            if device.type == "cuda"
            else ThreadPoolExecutor(threads, "upload")
        )

    def begin(self, parts: Sequence[torch.Tensor], release: Callable[[], None]) -> Arriving:
        """What arrives is complete for what the stream does next, and its sources have been read."""
        if all(part.device.type == self._device.type and not part.is_cpu for part in parts):
            return partial(joined, parts)
        first = parts[0]
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        target = torch.empty(shape, dtype=first.dtype, device=self._device)
        written, at, calls = _bytes(target), 0, []
        for part in parts:
            source = _bytes(part)
            for start in range(0, source.numel(), self._chunk):
                piece = source[start : start + self._chunk]
                calls.append(self._threads.submit(self._move, piece, written[at : at + piece.numel()]))
                at += piece.numel()
        calls.append(self._threads.submit(release))  # a page still being read by then is mapped again
        return partial(_arrived, target, calls)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    @torch.inference_mode()  # as whoever began this may be, and made the target
    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        slot = self._slot()
        try:
            # torch would copy with threads of its own, for each of these threads.
            ctypes.memmove(slot.buffer.data_ptr(), source.data_ptr(), source.numel())
            slot.done = self._copy(target, slot.buffer[: source.numel()])
        finally:
            self._used.append(slot)

    def _slot(self) -> _Slot:
        """A buffer to fill: one that is free, else a new one while there are few, else the next to become free."""
        with self._lock:
            first = self._used[0] if self._used else None
            if self._made == self._most or (first is not None and (first.done is None or first.done.query())):
                slot = self._used.popleft()
            else:
                self._made += 1
                slot = None
        if slot is None:
            return _Slot(torch.empty(self._chunk, dtype=torch.uint8, pin_memory=self._device.type == "cuda"))
        if slot.done is not None:
            slot.done.synchronize()
        return slot


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Flat, uint8; without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _arrived(target: torch.Tensor, calls: Sequence[Future[None]]) -> torch.Tensor:
    for call in calls:
        call.result()
    return target


def _copy_on_stream(target: torch.Tensor, source: torch.Tensor) -> Done:
    target.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return done
