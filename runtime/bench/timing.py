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
        """As :func:`copy_bandwidth`, of this clock's device."""
        return copy_bandwidth(self.device)


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes a second, read and written, of the best of ``repeats`` copies within the memory of ``device``.

    Of 2 GiB on a GPU, or what fits a quarter of its free memory; of 256 MiB on a CPU, by torch's threads.
    """
    cuda = device.type == "cuda"
    nbytes = min(2 << 30, torch.cuda.mem_get_info(device)[0] // 4) if cuda else 256 << 20
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # touched, so that no page is made while the clock runs
    seconds = (_cuda_seconds if cuda else _wall_seconds)(lambda: target.copy_(source), repeats)
    return 2 * nbytes / min(seconds)


def upload_bandwidth(device: torch.device, repeats: int = 5) -> float | None:
    """Bytes a second from pinned memory to a GPU, of the best of ``repeats`` copies of 256 MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.zeros(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device, pin_memory=False)
    return source.nbytes / min(_cuda_seconds(lambda: target.copy_(source, non_blocking=True), repeats))


def _cuda_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        found.append(float(start.elapsed_time(stop)) * 1e-3)
    return found


def _wall_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def spent(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    """Median seconds of ``call``, launched from Python as it is used, after one that is not counted."""
    call()
    found = (_cuda_seconds if device.type == "cuda" else _wall_seconds)(call, repeats)
    return sorted(found)[repeats // 2]
