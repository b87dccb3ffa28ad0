"""Kernels compiled while weights are on their way to a GPU, so that a first token does not wait for them one by one.

Triton holds Python's lock while it compiles, so that threads would take turns: processes do it, which share its cache
on the disk with this one and never touch the GPU. See ``ahead_worker``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
import torch

from lbq.formats.manifest import QuantizedModule
from lbq.formats.spec import ModelSpec
from lbq.runtime.devices import CUDA_CONTEXT, CudaDevice, Device
from lbq.runtime.kernels.gpu import Gpu, gpu_of
from lbq.runtime.text.sampling import SamplingOptions

PROMPTS = (16, 40, 128)  # tokens: one pass of int8 tensor cores, several, and float16 ones
WORKERS = 8  # at most: each has a copy of torch and of the compiler, 0.5 GB
BOOT = "import json, sys; job = sys.stdin.read(); sys.path[:] = json.loads(sys.argv[1]); "
BOOT += "from lbq.runtime.ahead_worker import main; main(job, int(sys.argv[2]), int(sys.argv[3]))"


@dataclass(frozen=True)
class Job:
    """What is going to run: a model's shapes, the GPU, and the texts that are expected."""

    spec: ModelSpec
    quantized: Mapping[str, QuantizedModule]
    gpu: Gpu
    eight: bool  # int8 keys and values
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
    return Job(spec, quantized, gpu, device.eight, context, PROMPTS, tuple({SamplingOptions(): 0, sampling: 0}))


@contextmanager
def compiled_ahead(job: Job | None) -> Iterator[None]:
    """Compile the kernels of ``job``, if Triton's cache may lack them, while the block runs; wait for them at its end.

    What does not get compiled is when it is launched, which also says what is wrong with it.
    """
    count = min(WORKERS, (os.cpu_count() or 1) - 1)
    if job is None or count < 1:
        yield
        return
    data = msgspec.json.encode(job)
    mark = _mark(data)
    if mark.exists():
        yield
        return
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with suppress(OSError):  # no more processes, no such interpreter
            workers += (_start(data, i, count) for i in range(count))
        yield
        for worker in workers:
            worker.wait()
        with suppress(OSError):  # written whatever came of it: what fails is tried once
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _start(data: bytes, index: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BOOT, msgspec.json.encode(sys.path).decode(), str(index), str(count)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert worker.stdin is not None
    with suppress(BrokenPipeError), worker.stdin:
        worker.stdin.write(data)
    return worker


def _mark(data: bytes) -> Path:
    """A file in Triton's cache that is there once this very job was done by these very sources."""
    import triton

    digest = sha256(data)
    digest.update(f"{triton.__version__} {torch.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return Path(triton.knobs.cache.dir) / f"lbq-{digest.hexdigest()}"
