# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""How programs of one launch leave what they share to the last of them."""

from __future__ import annotations

import triton
import triton.language as tl


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
