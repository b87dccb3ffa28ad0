#!/usr/bin/env python3
"""How fast weights get to a GPU: ``PYTHONPATH=src python3 scripts/gpu_loading.py FOLDER``.

FOLDER is an artifact, written as ``gpu_start.py`` does unless it is there. By several numbers of threads and sizes of
pieces: reading alone, the ring alone (reading and copying), and all of binding, pinning included; beside them the rate
from pinned memory. Files are in the system's page cache, and mapped anew each time. ``--device cpu`` tries the script.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_start import write_artifact

from lbq.formats.artifact import Artifact, open_artifact
from lbq.runtime import binding
from lbq.runtime.bench.timing import upload_bandwidth
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice, CudaDevice, Device
from lbq.runtime.needs import needs
from lbq.runtime.upload import CHUNK, SLOTS, THREADS, Arriving, Done, Staging


@dataclass(frozen=True)
class Way:
    """How a ring is made."""

    threads: int
    chunk: int  # MiB
    slots: int

    def staging(self, kind: type[Staging], device: torch.device) -> Staging:
        copy = None if device.type == "cuda" else at_once
        return kind(device, chunk=self.chunk << 20, slots=self.slots, threads=self.threads, copy=copy)


CHOSEN = Way(THREADS, CHUNK >> 20, SLOTS)
WAYS = (
    *(Way(threads, chunk, threads + 4) for threads in (4, 8, 12, 16) for chunk in (1, 2, 4)),
    Way(8, 8, 12),
    Way(8, 2, 24),
)


class Ended:
    """A copy that has ended."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


def at_once(target: torch.Tensor, source: torch.Tensor) -> Done:
    """What stands for a GPU's copy where there is none."""
    target.copy_(source)
    return Ended()


class Timed(Staging):
    """Adds up where its threads, and who waits for them, spend their time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spent: Counter[str] = Counter()
        self._copy = self._timed(self._copy, "threads: begin a copy")

    def begin(self, parts: Sequence[torch.Tensor], release: Callable[[], None]) -> Arriving:
        began = self._timed(super().begin, "main: begin")
        return self._timed(began(parts, self._timed(release, "threads: release")), "main: wait")

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._timed(super()._move, "threads: all of pieces")(source, target)

    def _slot(self) -> Any:
        made = self._made
        began = time.perf_counter()
        slot = super()._slot()
        what = "pin" if slot.done is None and made < self._most else "wait for a buffer"
        self.spent[f"threads: {what}"] += time.perf_counter() - began
        return slot

    def _timed(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            self.spent[what] += time.perf_counter() - began
            return result

        return timed


@contextmanager
def mapped(folder: Path, device: torch.device) -> Iterator[Artifact]:
    """The artifact mapped anew, and nothing pinned or taken that was given back."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
    with open_artifact(folder) as artifact:
        yield artifact


def words_through(staging: Staging, artifact: Artifact) -> tuple[float, int]:
    """Seconds and bytes of all words, without the kernels that are made of them."""
    began = time.perf_counter()
    arriving = [staging.begin([artifact.packed(name).words], lambda: None) for name in artifact.quantized]
    nbytes = sum(each().nbytes for each in arriving)
    staging.close()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, nbytes


def read(folder: Path, way: Way) -> float:
    """Bytes a second read by the threads, copied nowhere."""
    cpu = torch.device("cpu")
    with mapped(folder, cpu) as artifact:
        options = {"chunk": way.chunk << 20, "slots": way.slots, "threads": way.threads}
        seconds, nbytes = words_through(Staging(cpu, copy=lambda *_: Ended(), **options), artifact)
    return nbytes / seconds


def ring(folder: Path, way: Way, device: torch.device) -> float:
    """Bytes a second of the ring alone: pinned as it is needed, memory taken before."""
    with mapped(folder, device) as artifact:
        if device.type == "cuda":
            torch.empty(artifact.weight_bytes, dtype=torch.uint8, device=device)
        seconds, nbytes = words_through(way.staging(Staging, device), artifact)
    return nbytes / seconds


@dataclass(frozen=True)
class Binding:
    """Seconds of taking memory and of binding, and the bytes that were bound."""

    prepare: float
    bind: float
    nbytes: int

    @property
    def rate(self) -> float:
        return self.nbytes / self.bind


def whole(folder: Path, way: Way, on: Device, made: Callable[[torch.device], Staging] | None = None) -> Binding:
    """All of binding, up to the last copy's end."""
    binding.mover = made or partial(way.staging, Staging)
    with mapped(folder, on.device) as artifact:
        began = time.perf_counter()
        on.prepare(needs(artifact.spec, artifact.quantized, on).weights)
        prepared = time.perf_counter()
        bound = bind(artifact, on)
        if on.device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        del bound
        return Binding(prepared - began, ended - prepared, artifact.weight_bytes)


def tell_breakdown(folder: Path, way: Way, on: Device) -> None:
    stagings: list[Timed] = []

    def made(device: torch.device) -> Staging:
        found = way.staging(Timed, device)
        assert isinstance(found, Timed)
        stagings.append(found)
        return found

    found = whole(folder, way, on, made)
    (staging,) = stagings
    print(
        f"\nof {way}: memory taken in {found.prepare * 1e3:.1f} ms, bound in {found.bind * 1e3:.1f} ms; of that, in ms"
    )
    for what, seconds in sorted(staging.spent.items()):
        each = f" ({seconds * 1e3 / way.threads:.1f} a thread)" if what.startswith("threads") else ""
        print(f"    {what}: {seconds * 1e3:.1f}{each}")


def tell_ways(folder: Path, on: Device, best: float, times: int) -> None:
    print("\n| threads | piece, MiB | buffers | read, GB/s | ring, GB/s | whole binding, GB/s | of pinned |")
    print("|---|---|---|---|---|---|---|")
    for way in dict.fromkeys((*WAYS, CHOSEN)):
        if way.threads > 2 * (os.cpu_count() or 1):
            continue
        bound = [whole(folder, way, on) for _ in range(times)]
        rate = statistics.median(each.rate for each in bound)
        each = ", ".join(f"{b.rate / 1e9:.1f}" for b in bound)
        alone = f"{read(folder, way) / 1e9:.1f} | {ring(folder, way, on.device) / 1e9:.1f}"
        print(f"| {way.threads} | {way.chunk} | {way.slots} | {alone} | {each} | {rate / best:.0%} |", flush=True)


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
    first = whole(options.folder, CHOSEN, on)
    best = upload_bandwidth(on.device) or float("nan")
    print(f"from pinned memory: {best / 1e9:.1f} GB/s")
    print(f"first of all, which also loads kernels: {first.bind * 1e3:.0f} ms, {first.rate / 1e9:.1f} GB/s")
    tell_ways(options.folder, on, best, options.times)
    tell_breakdown(options.folder, CHOSEN, on)


if __name__ == "__main__":
    main()
