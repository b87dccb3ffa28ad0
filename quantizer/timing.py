"""How long a conversion will take on this machine, from a measurement of a second or two."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lbq.formats.disk import BLOCK, storage_errors
from lbq.quantizer.autoround.blocks import LAYERS
from lbq.quantizer.autoround.settings import Tuning
from lbq.quantizer.autoround.tuner import products_dtype
from lbq.quantizer.measure import Meter
from lbq.quantizer.plan import Plan, Quantize
from lbq.quantizer.prepare import Prepared
from lbq.quantizer.rtn import DEFAULT_RULES, quantize
from lbq.quantizer.tensors import CPU_BLOCK, GPU_BLOCK

LEAST_SECONDS = 0.2
READ_BYTES = 64 << 20
WRITE_BYTES = 32 << 20
ROW = 4096  # inputs of the matrix that is measured


@dataclass(frozen=True)
class Timing:
    """Seconds: of finding the codes and measuring them, of reading the source, and of writing and hashing the result.

    The source is hashed beside the rest, which is not counted.
    """

    quantizing: float
    reading: float | None  # None: the source is not here
    writing: float | None  # None: nothing can be written there

    @property
    def seconds(self) -> float:
        """Of what is known."""
        return self.quantizing + (self.reading or 0.0) + (self.writing or 0.0)


def estimate(prepared: Prepared, out: Path, device: torch.device) -> Timing:
    """Time the rounding of a few million random weights for every scheme of the plan, the products and the roundings of
    tuning steps where weights are tuned, reading a part of the source, and writing beside ``out`` a file without a
    name, of which nothing is left."""
    weights: Counter[tuple[int, int]] = Counter()
    for step in prepared.plan.steps:
        if isinstance(step, Quantize):
            group = step.group if step.group < step.entry.k else ROW
            weights[step.entry.bits, group] += step.entry.n * step.entry.k
    quantizing = sum(count * _seconds_a_weight(bits, group, device) for (bits, group), count in weights.items())
    if prepared.request.tuning is not None:
        quantizing += _tuning_seconds(prepared.plan, prepared.request.tuning, device)
    reading = None
    if not prepared.remote_bytes:
        largest = max((file.path for file in prepared.checkpoint.files.values()), key=lambda path: path.stat().st_size)
        reading = prepared.source_bytes * _seconds_a_byte(largest)
    a_byte = _seconds_a_written_byte(out.absolute().parent)
    writing = None if a_byte is None else prepared.plan.nbytes * (a_byte + _seconds_a_hashed_byte())
    return Timing(quantizing, reading, writing)


def _seconds_a_weight(bits: int, group: int, device: torch.device) -> float:
    """Rounding and measuring one, as a conversion does it."""
    rows = (GPU_BLOCK if device.type == "cuda" else CPU_BLOCK) // ROW
    source = torch.randn(rows, ROW).bfloat16()

    def work() -> None:
        block = source.to(device).float()
        packed = quantize(block, bits, group, DEFAULT_RULES[bits])
        Meter().add(block, packed.dequantize())
        packed.words.cpu()

    work()  # warms up
    return _seconds(work) / source.numel()


def _tuning_seconds(plan: Plan, tuning: Tuning, device: torch.device) -> float:
    """Every step multiplies three times, forward and for two gradients, and rounds every weight, forward and backward;
    and every sample goes forward through the block before and after it is tuned."""
    weights = sum(s.entry.n * s.entry.k for s in plan.steps if isinstance(s, Quantize) and s.module.startswith(LAYERS))
    length = min(tuning.tokens, plan.spec.context)
    product, rounding = _seconds_a_product(products_dtype(device), device), _seconds_a_rounding(device)
    a_step = min(tuning.batch, tuning.samples) * length * 3 * product + rounding
    through = 2 * tuning.samples * length * _seconds_a_product(torch.float32, device)
    return weights * (tuning.iterations * a_step + (through if tuning.calibrated else 0.0))


def _seconds_a_product(dtype: torch.dtype, device: torch.device) -> float:
    """One multiplication and addition in the product of large matrices."""
    side = 1 << (12 if device.type == "cuda" else 10)
    matrix = torch.randn(side, side, dtype=dtype, device=device)

    def work() -> None:
        float((matrix @ matrix)[0, 0])

    work()  # warms up
    return _seconds(work) / side**3


def _seconds_a_rounding(device: torch.device) -> float:
    """Rounding one weight in a step: what auto-round's does, with its gradients and the step itself."""
    weight = torch.randn((GPU_BLOCK if device.type == "cuda" else CPU_BLOCK) // ROW, ROW, device=device)
    shift = torch.zeros_like(weight, requires_grad=True)
    scale = torch.ones((*weight.shape[:-1], 1), device=device, requires_grad=True)
    gradient = torch.randn_like(weight)

    def work() -> None:
        shifted = weight / scale + shift
        rounded = (shifted.round() - shifted).detach() + shifted
        ((rounded.clamp(-8, 7) * scale) * gradient).sum().backward()
        assert shift.grad is not None
        with torch.no_grad():
            shift.sub_(shift.grad.sign(), alpha=1e-3)
        shift.grad = None
        float(shift.detach()[0, 0])

    work()  # warms up
    return _seconds(work) / weight.numel()


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, over enough calls that a moment's load counts little."""
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < LEAST_SECONDS:
        work()
        count += 1
    return (time.perf_counter() - start) / count


def _seconds_a_byte(path: Path) -> float:
    """Reading a file; what the system holds in memory is read from there, as a conversion would."""
    count, start = 0, time.perf_counter()
    with storage_errors(path), path.open("rb", buffering=0) as file:
        while count < READ_BYTES and (block := file.read(BLOCK)):
            count += len(block)
    return (time.perf_counter() - start) / max(1, count)


def _seconds_a_written_byte(folder: Path) -> float | None:
    """Writing to the disk of a folder, synced; None where that fails."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
    except OSError:
        return None
    return (time.perf_counter() - start) / WRITE_BYTES


def _seconds_a_hashed_byte() -> float:
    block = bytes(BLOCK)
    return _seconds(lambda: hashlib.sha256(block)) / len(block)
