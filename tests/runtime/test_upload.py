"""Tensors through a ring of buffers: what arrives, what is read at once, and that nothing is overwritten too early."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from lbq.formats.errors import DeviceError
from lbq.runtime.link import CudaLink
from lbq.runtime.upload import GAP, InPlace, Staging, mover, pieces

CPU = torch.device("cpu")


@dataclass
class Copies:
    """Copies that happen when somebody waits for their end, as late as a GPU may make them."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def synchronize(self):
        for target, source in self.copies:
            target.copy_(source)
        self.copies.clear()


@dataclass
class Late:
    """A link that copies as late as it may."""

    buffers: int = 0
    pinned: list[int] = field(default_factory=list)  # addresses
    closed: bool = False
    begun: Copies = field(default_factory=Copies)

    def buffer(self, nbytes):
        self.buffers += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, buffer):
        assert not self.begun.copies
        self.pinned.append(buffer.data_ptr())

    def copy(self, target, source):
        assert source.untyped_storage().data_ptr() in self.pinned
        self.begun.copies.append((target, source))

    def done(self):
        begun, self.begun = self.begun, Copies()
        return begun

    def close(self):
        self.closed = True


@dataclass
class Groups:
    groups: list[list[torch.Tensor]]


def parts_of(dtype, *shapes):
    return [torch.randint(0, 100, shape).to(dtype) for shape in shapes]


def moved(groups, link, **options):
    """What ``groups`` became, by a ring of their own."""
    staging = Staging(CPU, link=link, **options)
    each = Groups(groups)
    ((same, found),) = staging.move([each])
    assert same is each
    staging.close()
    return found


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.uint8])
def test_what_arrives(dtype, chunk, slots):
    parts, link = parts_of(dtype, (3, 5), (0, 5), (4, 5), (1, 5)), Late()
    found = moved([parts, parts[2:3]], link, chunk=chunk, slots=slots)
    assert torch.equal(found[0], torch.cat(parts))
    assert torch.equal(found[1], parts[2])
    assert found[1].data_ptr() != parts[2].data_ptr()
    assert link.buffers == len(link.pinned) <= slots
    assert link.closed


def test_several_that_move_together_and_one_after_the_other():
    staging = Staging(CPU, chunk=32, slots=2, link=Late())
    first, second, third = (Groups([parts_of(torch.int32, (3, 5), (2, 5))]) for _ in range(3))
    found = [*staging.move([first, second]), *staging.move([third])]
    staging.close()
    assert [each for each, _ in found] == [first, second, third]
    for each, (tensor,) in found:
        assert torch.equal(tensor, torch.cat(each.groups[0]))


def test_a_ring_that_does_not_wait_is_found_out():
    """The tests above can fail."""

    class Never(Late):
        def done(self):
            copies.append(super().done())
            return Copies()

    parts, copies = parts_of(torch.int32, (8, 4)), []
    (found,) = moved([parts], Never(), chunk=16, slots=2)
    for each in copies:
        each.synchronize()
    assert not torch.equal(found, parts[0])


def test_a_ring_that_is_dropped_waits_and_gives_its_buffers_back():
    (part,), link = parts_of(torch.int32, (8, 4)), Late()
    staging = Staging(CPU, chunk=1 << 20, link=link)
    ((_, (found,)),) = staging.move([Groups([[part]])])
    assert not link.closed
    del staging
    gc.collect()
    assert link.closed
    assert torch.equal(found, part)


def test_copies_that_were_begun_before_an_interrupt_are_waited_for():
    class Interrupted(Late):
        def copy(self, target, source):
            if self.begun.copies:
                raise KeyboardInterrupt
            super().copy(target, source)
            targets.append(target)

    parts, targets = parts_of(torch.uint8, (3, 5), (2, 5)), []
    file = torch.cat(parts)  # read as one piece
    staging = Staging(CPU, link=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        list(staging.move([Groups([[file[:3]], [file[3:]]])]))
    staging.close()
    assert torch.equal(targets[0], parts[0].view(-1))


def test_a_device_that_has_failed_is_not_told_of_twice():
    """What a finalizer raises would be printed as a traceback, and fails a test here."""

    class Failed(Late):
        def done(self):
            return Failing()

    class Failing:
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access")

    staging = Staging(CPU, link=Failed())
    list(staging.move([Groups([parts_of(torch.int32, (3, 5))])]))
    del staging
    gc.collect()


def test_memory_that_cannot_be_pinned_is_said(monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: RuntimeError(f"out of memory ({code})"))
    with pytest.raises(DeviceError, match=r"pinned.*out of memory \(2\); try --device cpu"):
        moved([parts_of(torch.int32, (3, 5))], CudaLink())


def test_vectors_and_what_is_not_contiguous():
    vector, matrix = parts_of(torch.bfloat16, (9,), (6, 4))
    found = moved([[vector], [matrix.t()]], Late(), chunk=5)
    assert torch.equal(found[0], vector)
    assert torch.equal(found[1], matrix.t())


def test_who_computes_without_gradients_may_move():
    (matrix,) = parts_of(torch.int32, (6, 4))
    with torch.inference_mode():
        (found,) = moved([[matrix]], Late())
    assert torch.equal(found, matrix)


def read(moves, chunk):
    """Where pieces begin and end, from the first byte of all, and how many parts each has."""
    found = list(pieces(moves, chunk))
    first = min(piece.begin for piece in found)
    return [(piece.begin - first, piece.end - first, len(piece.parts)) for piece in found]


def test_what_lies_side_by_side_is_read_at_once():
    file = torch.zeros(1 << 20, dtype=torch.uint8)
    parts = [file[0:1000], file[1000:3000], file[3100:4000]]
    moves = [(part, torch.empty_like(part)) for part in parts]
    assert read(reversed(moves), 1 << 20) == [(0, 4000, 3)]
    assert read(moves, 2500) == [(0, 2500, 2), (2500, 4000, 2)]
    assert read(moves, 1000) == [(0, 1000, 1), (1000, 2000, 1), (2000, 3000, 1), (3100, 4000, 1)]
    far = file[4000 + GAP + 1 :][:500]
    assert read([*moves, (far, torch.empty_like(far))], 1 << 20)[1:] == [(4001 + GAP, 4501 + GAP, 1)]


def test_what_lies_between_two_allocations_is_not_read():
    parts = parts_of(torch.uint8, *[(100,)] * 20)
    moves = [(part, torch.empty_like(part)) for part in parts]
    assert [len(piece.parts) for piece in pieces(moves, 1 << 20)] == [1] * 20


def test_the_same_tensor_twice():
    (part,) = parts_of(torch.uint8, (1000,))
    found = moved([[part], [part[100:300]], [part]], Late(), chunk=128)
    assert torch.equal(found[0], part)
    assert torch.equal(found[1], part[100:300])
    assert torch.equal(found[2], part)


def test_on_the_cpu_nothing_is_copied_that_need_not_be():
    one, two = parts_of(torch.int32, (2, 3), (1, 3))
    found = mover(CPU)
    assert isinstance(found, InPlace)
    ((_, (alone, both)),) = found.move([Groups([[one], [one, two]])])
    assert alone is one
    assert torch.equal(both, torch.cat([one, two]))


@pytest.mark.gpu
def test_to_a_gpu():
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("pinned memory takes a GPU")
    parts = parts_of(torch.int32, (1000, 333), (77, 333), (5000, 333))
    for _ in range(3):
        staging = Staging(device, chunk=100_000)
        ((_, found),) = staging.move([Groups([parts, [torch.cat(parts).bfloat16()]])])
        del staging
        assert torch.equal(found[0].cpu(), torch.cat(parts))
        assert torch.equal(found[1].cpu(), torch.cat(parts).bfloat16())
    staging = Staging(device)
    ((_, (there, both)),) = staging.move([Groups([[found[0]], [found[0], found[0]]])])
    assert there is found[0]
    assert torch.equal(both, torch.cat([there, there]))
