"""Tensors through a ring of buffers: what arrives, and that no buffer is filled before it was emptied."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lbq.runtime.upload import Staging, joined, joiner

CPU = torch.device("cpu")


@dataclass
class Later:
    """A copy that happens when somebody waits for it, as late as a GPU may be."""

    target: torch.Tensor
    source: torch.Tensor
    happened: bool = False

    def synchronize(self):
        if not self.happened:
            self.target.copy_(self.source)
        self.happened = True


def parts_of(dtype, *shapes):
    return [torch.randint(0, 100, shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.uint8])
def test_what_arrives(dtype, chunk, slots):
    parts = parts_of(dtype, (3, 5), (0, 5), (4, 5), (1, 5))
    staging = Staging(CPU, chunk=chunk, slots=slots, copy=Later)
    found = staging.join(parts)
    again = staging.join(parts[2:3])
    staging.finish()
    assert torch.equal(found, torch.cat(parts))
    assert torch.equal(again, parts[2])
    assert again.data_ptr() != parts[2].data_ptr()


def test_a_ring_that_does_not_wait_is_found_out():
    """The test above can fail."""

    class Never(Later):
        def synchronize(self):
            pass

    copies = []

    def copy(target, source):
        copies.append(Later(target, source))
        return Never(target, source)

    parts = parts_of(torch.int32, (8, 4))
    found = Staging(CPU, chunk=16, slots=2, copy=copy).join(parts)
    for each in copies:
        each.synchronize()
    assert not torch.equal(found, parts[0])


def test_vectors_and_what_is_not_contiguous():
    vector, matrix = parts_of(torch.bfloat16, (9,), (6, 4))
    staging = Staging(CPU, chunk=5, copy=Later)
    found = [staging.join([vector]), staging.join([matrix.t()])]
    staging.finish()
    assert torch.equal(found[0], vector)
    assert torch.equal(found[1], matrix.t())


def test_on_the_cpu_nothing_is_copied_that_need_not_be():
    one, two = parts_of(torch.int32, (2, 3), (1, 3))
    assert joiner(CPU) is joined
    assert joined([one]) is one
    assert torch.equal(joined([one, two]), torch.cat([one, two]))


@pytest.mark.gpu
def test_to_a_gpu():
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("pinned memory takes a GPU")
    parts = parts_of(torch.int32, (1000, 333), (77, 333), (5000, 333))
    staging = Staging(device, chunk=100_000)
    for _ in range(3):
        found = staging.join(parts)
        assert found.is_cuda
        assert torch.equal(found.cpu(), torch.cat(parts))
    there = found.clone()
    assert staging.join([there]) is there
    assert torch.equal(staging.join([there, there]), torch.cat([there, there]))
