"""Hashes of kernels that do not follow the order of their first launches.

Triton 3.6 and 3.7 leave constants of a callee out of its caller's hash where the callee was not hashed before. The
hash, by which the cache on the disk finds a kernel, would differ between processes that launch in another order.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

PACKAGE = "lbq.runtime.kernels."


@cache
def settle() -> None:
    """Hash every function before those that call it; 30 ms."""
    from triton.runtime.jit import JITFunction

    import lbq.runtime.fused.engine
    import lbq.runtime.prompts  # noqa: F401  these two import every kernel

    settled: set[int] = set()

    def hashed(function: Any) -> None:
        if id(function) in settled:
            return
        settled.add(id(function))
        for name in function.fn.__code__.co_names:
            called = function.__globals__.get(name)
            if isinstance(called, JITFunction):
                hashed(called)
        _ = function.cache_key

    for module in [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]:
        for value in list(vars(module).values()):
            if isinstance(value, JITFunction):
                hashed(value)
