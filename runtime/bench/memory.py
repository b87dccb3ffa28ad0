"""The most memory that was held since a moment: of a GPU by torch, of this process on a CPU."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path

import torch


class Peak:
    """Begins to watch when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # some containers forbid it: then the peak is that of the whole process
                Path("/proc/self/clear_refs").write_text("5")

    def nbytes(self) -> int:
        """Bytes at the peak: torch's allocations on a GPU, else all resident memory of this process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            if found := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
                return int(found[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
