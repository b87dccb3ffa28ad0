# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""How launches take turns, and how programs of one launch leave what they share to the last of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def let_in(PDL: tl.constexpr, ONWARD: tl.constexpr):
    """First of all in a kernel: with programmatic dependent launch let the next launch's programs start, if ONWARD.

    Where every launch does that, programs of five launches lie on the GPU at once, each waiting for the one before: so
    much more is under way early, and so much more they crowd on to the multiprocessors that have room, as many as six
    of one launch on one of them and none on another.
    """
    if PDL and ONWARD:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def take_turn(PDL: tl.constexpr, ONWARD: tl.constexpr):
    """Wait for the launch before this one to end, and let the next one's programs start now if they were not let in.

    What a program does before this overlaps with the launch before.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        if not ONWARD:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def arrived(arrivals_ptr, block, expected):
    """Whether this program is the last of ``expected`` to get here with ``block``; what all of them stored is seen.

    The counter is left at zero, as the next launch needs it.
    """
    tl.debug_barrier()  # every thread's stores, before one of them says so
    last = tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(arrivals_ptr + block, 0)
    return last
