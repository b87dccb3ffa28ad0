#!/usr/bin/env python3
"""How fast weights get to a GPU: ``PYTHONPATH=src python3 scripts/gpu_loading.py FOLDER``.

FOLDER is an artifact, written as ``gpu_start.py`` does unless it is there. By several sizes of buffers and numbers of
threads: reading alone, all of binding, pinning included, and the best rate from pinned memory beside them; then where
the time of binding goes. Files are in the system's page cache, and mapped anew each time. ``--shape tiny --device cpu``
tries the script.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from gpu_start import write_artifact

from lbq.formats.artifact import Artifact, open_artifact
from lbq.runtime import binding
from lbq.runtime.bench.timing import upload_bandwidth
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice, CudaDevice, Device
from lbq.runtime.link import CudaLink
from lbq.runtime.needs import needs
from lbq.runtime.upload import CHUNK, SLOTS, Link, Staging


@dataclass(frozen=True)
class Way:
    """How a ring is made."""

    chunk: int  # MiB
    slots: int
    threads: int  # torch's

    def staging(self, device: torch.device, link: Link) -> Staging:
        return Staging(device, chunk=self.chunk << 20, slots=self.slots, link=link)


CORES = torch.get_num_threads()
CHOSEN = Way(CHUNK >> 20, SLOTS, CORES)
WAYS = (
    *(Way(chunk, slots, CORES) for chunk, slots in ((4, 4), (8, 3), (8, 4), (16, 2), (16, 3), (32, 2), (32, 3))),
    *(Way(CHUNK >> 20, SLOTS, threads) for threads in (4, 8, 12)),
)


class Copying:
    """What stands for a link to a GPU: copies at once, or nothing."""

    def __init__(self, *, copies: bool) -> None:
        self._copies = copies

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, buffer: torch.Tensor) -> None:
        """Nothing to pin."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._copies:
            target.copy_(source)

    def done(self) -> Copying:
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


def link_to(device: torch.device) -> Link:
    return CudaLink() if device.type == "cuda" else Copying(copies=True)


@contextmanager
def mapped(folder: Path, device: torch.device, threads: int) -> Iterator[Artifact]:
    """The artifact mapped anew, and nothing pinned or taken that was given back."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    with open_artifact(folder) as artifact:
        yield artifact


@dataclass(frozen=True)
class Binding:
    """Seconds of taking memory and of binding, and the bytes that were bound."""

    prepare: float
    bind: float
    nbytes: int

    @property
    def rate(self) -> float:
        return self.nbytes / self.bind


def bound(folder: Path, way: Way, on: Device, link: Link | None = None) -> Binding:
    """All of binding, up to the end of the last copy."""
    binding.mover = lambda device: way.staging(device, link_to(device) if link is None else link)
    with mapped(folder, on.device, way.threads) as artifact:
        began = time.perf_counter()
        on.prepare(needs(artifact.spec, artifact.quantized, on).weights)
        prepared = time.perf_counter()
        made = bind(artifact, on)
        if on.device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        del made
        return Binding(prepared - began, ended - prepared, artifact.weight_bytes)


@dataclass
class Words:
    """All words of an artifact."""

    groups: list[list[torch.Tensor]]


def read(folder: Path, way: Way) -> float:
    """Bytes a second read into buffers, and copied nowhere."""
    cpu = torch.device("cpu")
    with mapped(folder, cpu, way.threads) as artifact:
        words = Words([[artifact.packed(name).words] for name in artifact.quantized])
        began = time.perf_counter()
        next(way.staging(cpu, Copying(copies=False)).move([words]))
        seconds = time.perf_counter() - began
        return sum(group[0].nbytes for group in words.groups) / seconds


def tell_ways(folder: Path, on: Device, best: float, times: int) -> None:
    print("\n| buffers | MiB each | torch's threads | read alone, GB/s | whole binding, GB/s | of pinned |")
    print("|---|---|---|---|---|---|")
    for way in dict.fromkeys((*WAYS, CHOSEN)):
        if way.threads > (os.cpu_count() or 1):
            continue
        found = [bound(folder, way, on) for _ in range(times)]
        rate = statistics.median(each.rate for each in found)
        each = ", ".join(f"{b.rate / 1e9:.1f}" for b in found)
        line = f"| {way.slots} | {way.chunk} | {way.threads} | {read(folder, way) / 1e9:.1f} | {each}"
        print(f"{line} | {rate / best:.0%} |", flush=True)


class Spent:
    """Milliseconds inside functions."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()
        self._watched: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, name: str, what: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.times[what] += 1000 * (time.perf_counter() - began)

        self._watched.append((owner, name, function))
        setattr(owner, name, timed)

    def close(self) -> None:
        for owner, name, function in self._watched:
            setattr(owner, name, function)


def tell_breakdown(folder: Path, way: Way, on: Device) -> None:
    spent, link = Spent(), link_to(on.device)
    spent.watch(link, "pin", "pin")
    spent.watch(link, "copy", "begin copies")
    spent.watch(link, "done", "begin copies")
    spent.watch(link, "close", "unpin")
    spent.watch(Staging, "_slot", "wait for buffers")
    spent.watch(Staging, "_send", "read")
    spent.watch(Staging, "_target", "memory on the device")
    spent.watch(Artifact, "release", "release")
    spent.watch(Artifact, "release_dense", "release")
    spent.watch(Artifact, "packed", "look up")
    spent.watch(Artifact, "dense", "look up")
    spent.watch(type(on), "packed", "kernels")
    found = bound(folder, way, on, link)
    spent.close()
    spent.times["read"] -= sum(spent.times[what] for what in ("pin", "wait for buffers", "begin copies"))
    spent.times["else"] = 1000 * found.bind - sum(spent.times.values())
    print(f"\n{way}: memory taken in {found.prepare * 1e3:.1f} ms, bound in {found.bind * 1e3:.1f} ms. Of that, in ms:")
    print(", ".join(f"{what} {spent:.1f}" for what, spent in spent.times.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--times", type=int, default=3, help="bindings of each way")
    options = parser.parse_args()
    if not options.folder.exists():
        write_artifact(options.folder, options.shape, options.bits, options.device)
    on: Device = CudaDevice(exact=False) if options.device == "cuda" else CpuDevice(exact=False)
    first = bound(options.folder, CHOSEN, on)
    best = upload_bandwidth(on.device) or float("nan")
    print(f"from pinned memory: {best / 1e9:.1f} GB/s")
    print(f"first of all, which also loads kernels: {first.bind * 1e3:.0f} ms, {first.rate / 1e9:.1f} GB/s")
    tell_ways(options.folder, on, best, options.times)
    tell_breakdown(options.folder, CHOSEN, on)


if __name__ == "__main__":
    main()
