"""Tensors through a ring of buffers: what arrives, and that no buffer is filled before it was emptied."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch

from lbq.runtime.upload import InPlace, Staging, mover

CPU = torch.device("cpu")


@dataclass
class Later:
    """A copy that happens when somebody waits for it, as late as a GPU may be."""

    target: torch.Tensor
    source: torch.Tensor
    lock: threading.Lock = field(default_factory=threading.Lock)
    happened: bool = False

    def query(self):
        return self.happened

    def synchronize(self):
        with self.lock:
            if not self.happened:
                self.target.copy_(self.source)
            self.happened = True


class Copies(list):
    """What began to be copied: each is a :class:`Later`."""

    def __call__(self, target, source):
        self.append(Later(target, source))
        return self[-1]

    def happen(self):
        for copy in self:
            copy.synchronize()


def parts_of(dtype, *shapes):
    return [torch.randint(0, 100, shape).to(dtype) for shape in shapes]


def moved(parts, copies, **options):
    """``parts`` joined by a staging of their own."""
    staging = Staging(CPU, copy=copies, **options)
    found = staging.begin(parts, lambda: None)()
    staging.close()
    return found


@pytest.fixture(autouse=True)
def threads_take_turns():
    """So often that what they do to each other is seen."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("slots", "threads"), [(1, 1), (2, 1), (3, 8), (5, 3)])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.uint8])
def test_what_arrives(dtype, chunk, slots, threads):
    parts, copies, released = parts_of(dtype, (3, 5), (0, 5), (4, 5), (1, 5)), Copies(), []
    staging = Staging(CPU, chunk=chunk, slots=slots, threads=threads, copy=copies)
    found = staging.begin(parts, lambda: released.append("all"))
    again = staging.begin(parts[2:3], lambda: released.append("again"))
    found, again = found(), again()
    staging.close()
    assert sorted(released) == ["again", "all"]
    assert len({copy.source.data_ptr() for copy in copies}) <= slots
    copies.happen()
    assert torch.equal(found, torch.cat(parts))
    assert torch.equal(again, parts[2])
    assert again.data_ptr() != parts[2].data_ptr()


def test_a_ring_that_does_not_wait_is_found_out():
    """The test above can fail."""

    class Impatient(Copies):
        def __call__(self, target, source):
            super().__call__(target, source)
            return Later(target, source, happened=True)

    parts, copies = parts_of(torch.int32, (8, 4)), Impatient()
    found = moved(parts, copies, chunk=16, slots=2, threads=2)
    copies.happen()
    assert not torch.equal(found, parts[0])


def test_buffers_are_made_as_they_are_needed():
    class AtOnce(Copies):
        def __call__(self, target, source):
            copy = super().__call__(target, source)
            copy.synchronize()
            return copy

    copies = AtOnce()
    moved(parts_of(torch.int32, (8, 4)), copies, chunk=16, slots=8, threads=1)
    assert len(copies) == 8
    assert len({copy.source.data_ptr() for copy in copies}) == 1


def test_vectors_and_what_is_not_contiguous():
    vector, matrix = parts_of(torch.bfloat16, (9,), (6, 4))
    copies = Copies()
    found = [moved([vector], copies, chunk=5), moved([matrix.t()], copies, chunk=5)]
    copies.happen()
    assert torch.equal(found[0], vector)
    assert torch.equal(found[1], matrix.t())


def test_who_computes_without_gradients_may_move():
    (matrix,), copies = parts_of(torch.int32, (6, 4)), Copies()
    with torch.inference_mode():
        found = moved([matrix], copies)
        copies.happen()
    assert torch.equal(found, matrix)


def test_what_goes_wrong_is_heard_and_takes_no_buffer():
    def fails(*_):
        raise RuntimeError("CUDA error")

    staging = Staging(CPU, chunk=16, slots=2, threads=2, copy=fails)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="CUDA error"):
            staging.begin(parts_of(torch.int32, (8, 4)), lambda: None)()
    staging.close()


def test_what_nobody_wants_is_left():
    held, copies = threading.Event(), Copies()

    def copy(target, source):
        held.wait(10)
        return copies(target, source)

    staging = Staging(CPU, chunk=16, slots=1, threads=1, copy=copy)
    staging.begin(parts_of(torch.int32, (8, 4)), lambda: None)
    threading.Timer(0.05, held.set).start()
    staging.close()
    assert len(copies) <= 1


def test_on_the_cpu_nothing_is_copied_that_need_not_be():
    one, two = parts_of(torch.int32, (2, 3), (1, 3))
    released = []
    found = mover(CPU)
    assert isinstance(found, InPlace)
    assert found.begin([one], lambda: released.append(1))() is one
    assert torch.equal(found.begin([one, two], lambda: released.append(1))(), torch.cat([one, two]))
    found.close()
    assert not released  # whoever uses them knows when they are not used


@pytest.mark.gpu
def test_to_a_gpu():
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("pinned memory takes a GPU")
    parts = parts_of(torch.int32, (1000, 333), (77, 333), (5000, 333))
    staging = Staging(device, chunk=100_000, slots=3)
    found = [staging.begin(parts, lambda: None), staging.begin([torch.cat(parts).bfloat16()], lambda: None)]
    arrived = [each().cpu() for each in found]
    staging.close()
    assert torch.equal(arrived[0], torch.cat(parts))
    assert torch.equal(arrived[1], torch.cat(parts).bfloat16())
