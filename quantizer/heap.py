"""Freed memory that goes back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's malloc_trim; None in another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return what has been freed. Between results that stay, glibc keeps the holes that temporary tensors leave: over a
    whole model as much again as the results."""
    trim = _trim()
    if trim is not None:
        trim(0)
