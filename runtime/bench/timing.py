"""Clocks: medians of CUDA-graph replays, and the copy bandwidth that times are shares of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


class Clock:
    """Times launches on a device; on a CPU, where only the interpreter runs, once and by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"

    def seconds(self, calls: Sequence[Callable[[], object]], replays: int = 15, *, least: int = 1) -> float:
        """Median seconds a call over replays of one CUDA graph of all ``calls``, repeated to at least ``least``.

        Each is called twice before, so that what compiles or allocates has done so.
        """
        calls = list(calls) * -(-least // len(calls))
        if not self._cuda:
            began = time.perf_counter()
            calls[0]()
            return time.perf_counter() - began
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in {id(call): call for call in calls}.values():
                call()
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(replays + 2):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(float(start.elapsed_time(stop)) * 1e-3 / len(calls))
        return sorted(times[2:])[replays // 2]

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of the best of ten device-to-device copies of 2 GiB; 1e9 on a CPU."""
        if not self._cuda:
            return 1e9
        source = torch.empty(2 << 30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        best = 0.0
        for _ in range(10):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            best = max(best, 2 * source.nbytes / (start.elapsed_time(stop) * 1e-3))
        return best
