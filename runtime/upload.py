"""From a mapped file to a GPU: through pinned buffers, the copies to the GPU of one while the next is read.

A copy from pageable memory is staged by the driver, on one thread, and waits for itself. Here torch's threads read the
mapped pages, each its share of a buffer, while the GPU fetches what the buffers before it hold. A buffer holds whatever
lies side by side in the file, parts of several matrices: while Python begins a copy nothing is read. Python's own
threads were tried as readers and were half as fast: each piece has them wait for Python's lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from lbq.formats.errors import DeviceError
from lbq.runtime.link import CudaLink

CHUNK = 16 << 20  # bytes
SLOTS = 3  # chunks that are read, waiting or on their way
GAP = 64 << 10  # bytes between two tensors, up to which they are read as one

Move = tuple[torch.Tensor, torch.Tensor]  # from the host's memory, contiguous, to as many bytes of a device's


class Moving(Protocol):
    """Matrices that go to a device together."""

    @property
    def groups(self) -> Sequence[Sequence[torch.Tensor]]:
        """Matrices of one width, or vectors, that become one: rows one after the other."""
        ...


M = TypeVar("M", bound=Moving)


class Mover(Protocol):
    """How matrices get to a device."""

    def move(self, moving: Iterable[M]) -> Iterator[tuple[M, list[torch.Tensor]]]:
        """Each, and what its groups became there: complete for what the current stream does next."""
        ...


class Done(Protocol):
    """Copies that were begun."""

    def synchronize(self) -> None:
        """Wait for their end."""
        ...


class Link(Protocol):
    """Pinned memory, and copies from it to a device, in order."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Bytes that can be pinned."""
        ...

    def pin(self, buffer: torch.Tensor) -> None:
        """Pin a buffer that was filled, before the first copy from it. Raises DeviceError where that cannot be."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy bytes from a buffer."""
        ...

    def done(self) -> Done:
        """The end of what was begun until now."""
        ...

    def close(self) -> None:
        """Pin no buffers any more, nothing being copied from them."""
        ...


def mover(device: torch.device) -> Mover:
    """How matrices get to ``device``."""
    return Staging(device) if device.type == "cuda" else InPlace()


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows one after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class InPlace:
    """On the CPU: a single matrix stays where it is, mapped; others are joined once they are asked for."""

    def move(self, moving: Iterable[M]) -> Iterator[tuple[M, list[torch.Tensor]]]:
        for each in moving:
            yield each, [joined(group) for group in each.groups]


@dataclass
class _Slot:
    buffer: torch.Tensor
    done: Done | None = None  # of the copies from it; None before the first


@dataclass
class _Piece:
    """Bytes of memory that are read at once, and where parts of them go."""

    source: torch.Tensor
    begin: int  # address
    end: int = 0
    parts: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # from which byte of these, to which others


class Staging:
    """A ring of pinned buffers, made when they are first needed. Not for several threads at once."""

    def __init__(
        self, device: torch.device, *, chunk: int = CHUNK, slots: int = SLOTS, link: Link | None = None
    ) -> None:
        """By default copies are made on the stream that is current when they are begun."""
        self._device, self._chunk, self._count = device, chunk, slots
        self._link = CudaLink() if link is None else link
        self._slots: list[_Slot] = []
        self._next = 0
        self.close = weakref.finalize(self, _close, self._link, self._slots)

    def move(self, moving: Iterable[M]) -> Iterator[tuple[M, list[torch.Tensor]]]:
        """All of them at once, in the order in which they lie in memory: read by the time the first is given."""
        moves: list[Move] = []
        found = [(each, [self._target(group, moves) for group in each.groups]) for each in moving]
        for piece in pieces(moves, self._chunk):
            self._send(piece)
        yield from found

    def _target(self, group: Sequence[torch.Tensor], moves: list[Move]) -> torch.Tensor:
        if all(part.device.type == self._device.type and not part.is_cpu for part in group):
            return joined(group)
        first = group[0]
        shape = (sum(part.shape[0] for part in group), *first.shape[1:])
        target = torch.empty(shape, dtype=first.dtype, device=self._device)
        parts = [part.contiguous() for part in group]
        moves += zip(parts, _bytes(target).split([part.nbytes for part in parts]), strict=True)
        return target

    def _send(self, piece: _Piece) -> None:
        slot = self._slot()
        nbytes = piece.end - piece.begin
        offset = piece.begin - piece.source.untyped_storage().data_ptr()
        source = _bytes(piece.source).as_strided((nbytes,), (1,), offset)
        slot.buffer[:nbytes].copy_(source)  # by all of torch's threads
        if slot.done is None:
            self._link.pin(slot.buffer)
        try:
            for start, target in piece.parts:
                self._link.copy(target, slot.buffer[start : start + target.numel()])
        finally:  # those begun before an interrupt too
            slot.done = self._link.done()

    def _slot(self) -> _Slot:
        """The buffer that was used longest ago, free again."""
        if len(self._slots) < self._count:
            self._slots.append(_Slot(self._link.buffer(self._chunk)))
            return self._slots[-1]
        slot = self._slots[self._next]
        self._next = (self._next + 1) % self._count
        if slot.done is not None:
            slot.done.synchronize()
        return slot


def pieces(moves: Iterable[Move], chunk: int) -> Iterator[_Piece]:
    """What is read at once, in the order of memory: up to ``chunk`` bytes of one storage, almost side by side."""
    piece: _Piece | None = None
    storage = 0
    for source, target in sorted(moves, key=lambda move: move[0].data_ptr()):
        begin, mine, done = source.data_ptr(), source.untyped_storage().data_ptr(), 0
        while done < source.nbytes:
            at = begin + done
            if piece is None or mine != storage or at > piece.end + GAP or not 0 <= at - piece.begin < chunk:
                if piece is not None:
                    yield piece
                piece, storage = _Piece(source, at), mine
            count = min(piece.begin + chunk - at, source.nbytes - done)
            piece.parts.append((at - piece.begin, target[done : done + count]))
            piece.end = max(piece.end, at + count)
            done += count
    if piece is not None:
        yield piece


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor, flat, as uint8."""
    return tensor.view(-1).view(torch.uint8)


def _close(link: Link, slots: list[_Slot]) -> None:
    with suppress(RuntimeError, DeviceError):  # of a device that has failed, which was said: here is nobody to tell
        for slot in slots:
            if slot.done is not None:
                slot.done.synchronize()
        link.close()
    slots.clear()
