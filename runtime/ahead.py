"""Kernels compiled while weights are on their way to a GPU, so that a first token does not wait for them one by one.

Triton holds Python's lock while it compiles, so that threads would take turns. Processes do it, forked so that they
have torch imported (3 s), which share Triton's cache on the disk with this one and never touch the GPU.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import msgspec
import torch

from lbq.formats.manifest import QuantizedModule
from lbq.formats.spec import ModelSpec
from lbq.runtime.devices import CUDA_CONTEXT, CacheKind, CudaDevice, Device
from lbq.runtime.kernels.gpu import Gpu, gpu_of
from lbq.runtime.kernels.hashes import settle
from lbq.runtime.text.sampling import SamplingOptions

PROMPTS = (5, 18, 40, 128)  # tokens: a pass each, whole and begun passes of int8 tensor cores, and float16 ones
# At most so many processes. With 12 of them a first token comes after 9 to 12 s on an H200 with 16 cores and an empty
# cache, where one kernel after the other takes 16.
WORKERS = 12
SECONDS = 30.0  # that they are waited for


@dataclass(frozen=True)
class Job:
    """What is going to run: a model's shapes, the GPU, and the texts that are expected."""

    spec: ModelSpec
    quantized: Mapping[str, QuantizedModule]
    gpu: Gpu
    kv_cache: CacheKind
    context: int
    prompts: tuple[int, ...]  # tokens
    ways: tuple[SamplingOptions, ...]  # to choose tokens


def job_for(
    spec: ModelSpec,
    quantized: Mapping[str, QuantizedModule],
    device: Device,
    context: int | None,
    sampling: SamplingOptions,
) -> Job | None:
    """What texts of any length on ``device`` launch, chosen greedily or by ``sampling``.

    None where that is not worth it: on a CPU, and without the fused step of a GPU.
    """
    if not isinstance(device, CudaDevice) or device.exact or not device.fused:
        return None
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    assert gpu is not None
    context = context or min(spec.context, CUDA_CONTEXT)
    return Job(spec, quantized, gpu, device.kv_cache, context, PROMPTS, tuple({SamplingOptions(): 0, sampling: 0}))


@contextmanager
def compiled_ahead(job: Job | None) -> Iterator[None]:
    """Compile the kernels of ``job``, if Triton's cache may lack them, while the block runs; wait for them at its end.

    What does not get compiled is when it is launched, which also says what is wrong with it. So it is, too, in a
    program of several threads, which is not forked: what another thread holds would stay held.
    """
    count = min(WORKERS, (os.cpu_count() or 1) - 1)
    if job is None or count < 1 or threading.active_count() > 1 or not hasattr(os, "fork"):
        yield
        return
    settle()
    mark = _mark(job)
    if mark.exists():
        yield
        return
    turns, ends = os.pipe()
    workers: list[int] = []
    threads = torch.get_num_threads()
    try:
        with open(ends, "wb", buffering=0) as file, suppress(OSError):  # no more processes
            file.write(bytes(range(256)))  # whoever reads a byte compiles the kernel of that number
            workers += (_fork(job, turns, ends) for _ in range(count))
        torch.set_num_threads(max(1, threads - len(workers)))  # those that read weights wait for the last of them
        yield
        _wait(workers)
        with suppress(OSError):  # written whatever came of it: what fails is tried once
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    finally:
        torch.set_num_threads(threads)
        os.close(turns)
        for worker in workers:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(worker, signal.SIGKILL)
                os.waitpid(worker, 0)


def _fork(job: Job, turns: int, ends: int) -> int:
    """The id of a process that compiles kernels until there are none left."""
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are torch's own: they hold nothing
            process = os.fork()
        if process:
            return process
        os.close(ends)
        _work(job, turns, signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _work(job: Job, turns: int, signals: set[int | signal.Signals]) -> NoReturn:
    """In a new process: nothing that belongs to the one it came from is tidied up or written to here."""
    try:
        gc.disable()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        torch.set_num_threads(1)  # others, which OpenMP believes to have, stayed where this was forked
        # torch imports its compiler, for seconds, to say of operators on "meta" that they are not to be compiled.
        without = ModuleType("torch._dynamo")
        vars(without)["disable"] = lambda function, *_, **__: function
        sys.modules["torch._dynamo"] = torch._dynamo = without
        from lbq.runtime.launches import compile_kernels

        compile_kernels(job, (turn[0] for turn in iter(lambda: os.read(turns, 1), b"")))
    finally:
        os._exit(0)


def _wait(workers: list[int]) -> None:
    """For their ends, SECONDS at most; those that ended leave the list."""
    until = time.monotonic() + SECONDS
    while workers and time.monotonic() < until:
        for worker in [each for each in workers if _ended(each)]:
            workers.remove(worker)
        time.sleep(0.005)


def _ended(worker: int) -> bool:
    try:
        return os.waitpid(worker, os.WNOHANG)[0] != 0
    except ChildProcessError:  # a program that ignores its children's ends, or collects them itself
        return True


def _mark(job: Job) -> Path:
    """A file in Triton's cache that is there once this very job was done by these very sources."""
    import triton

    digest = sha256(msgspec.json.encode(job))
    digest.update(f"{triton.__version__} {torch.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return Path(triton.knobs.cache.dir) / f"lbq-{digest.hexdigest()}"
