"""What a conversion and its result will take, said before any of it: sizes, memory, disk, time, kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lbq.formats.disk import free_bytes, readable
from lbq.formats.errors import UsageError
from lbq.formats.manifest import DenseTensor, QuantizedModule
from lbq.formats.readers import Fit, sglang_fit, vllm_fit
from lbq.formats.scheme import Scheme
from lbq.formats.wording import pattern
from lbq.quantizer.plan import Plan, Quantize
from lbq.quantizer.prepare import Prepared
from lbq.quantizer.timing import Timing, estimate
from lbq.runtime.binding import KernelUse
from lbq.runtime.devices import CpuDevice, CudaDevice
from lbq.runtime.needs import Needs, needs


@dataclass(frozen=True)
class TensorPlan:
    """Tensors that differ in the layer's number alone (``*``), and what they become: INT4, BF16."""

    names: str
    shape: tuple[int, ...]
    becomes: str
    group: int | None
    count: int
    bytes: int


@dataclass(frozen=True)
class LayerPlan:
    """Fused units of one shape and scheme: what serves them in lbq, and in vLLM and SGLang on an NVIDIA GPU.

    ``bits`` 16 is BF16, which the other tools serve as they serve any model; ``group`` None is one scale a row.
    """

    units: str
    count: int
    n: int
    k: int
    bits: int
    group: int | None
    kernel: str
    fallback: str | None
    vllm: Fit | None
    sglang: Fit | None


@dataclass(frozen=True)
class Memory:
    """Bytes to run with one text of ``context`` tokens; ``spare`` is for activations and graphs. ``free`` is what the
    device has now, None where it is not here."""

    weights: int
    cache: int
    spare: int
    context: int
    free: int | None

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.spare


@dataclass(frozen=True)
class Forecast:
    """All that ``lbq plan`` says; sizes in bytes."""

    path: str
    bytes: int
    bits_per_weight: float
    source_bytes: int
    remote_bytes: int  # on the Hub, and yet to be fetched
    largest_remote: int  # file of them
    cache_free: int | None  # bytes free where they would go; None: they are here
    peak_bytes: int  # of memory on top of the interpreter's, to convert
    disk_bytes: int  # to convert, the artifact among them
    disk_free: int
    method: Literal["rtn", "autoround"]
    timing: Timing | None  # None: the device is not here
    device: Literal["cpu", "cuda"]  # whose kernels ``layers`` names
    tensors: tuple[TensorPlan, ...]
    layers: tuple[LayerPlan, ...]
    cpu: Memory
    gpu: Memory
    notes: tuple[str, ...]
    quantized: Mapping[str, QuantizedModule]
    dense: Mapping[str, DenseTensor]


def forecast(
    prepared: Prepared, out: Path, device: Literal["auto", "cpu", "cuda"] = "auto", context: int | None = None
) -> Forecast:
    """Say what ``prepared`` will take if it is written to ``out`` and then run on ``device``, which need not be here.

    ``context`` is the longest text to be run, by default 8192 tokens or what the model was made for. Takes a second or
    two, for the measurement that times come from. Raises UsageError for a context the model was not made for.
    """
    plan, spec = prepared.plan, prepared.plan.spec
    if context is not None and not 1 <= context <= spec.context:
        raise UsageError(f"context {context}: {prepared.source.name} was made for 1 to {spec.context} tokens")
    has_gpu = torch.cuda.is_available()
    kind: Literal["cpu", "cuda"] = "cuda" if device == "cuda" or (device == "auto" and has_gpu) else "cpu"
    on_cpu = needs(spec, plan.quantized, CpuDevice(exact=False), context)
    on_gpu = needs(spec, plan.quantized, CudaDevice(exact=False), context)
    here = kind == "cpu" or has_gpu
    return Forecast(
        path=readable(out),
        bytes=plan.nbytes,
        bits_per_weight=plan.bits_per_weight,
        source_bytes=prepared.source_bytes,
        remote_bytes=prepared.remote_bytes,
        largest_remote=prepared.largest_remote,
        cache_free=free_bytes(prepared.source.folder) if prepared.remote_bytes else None,
        peak_bytes=prepared.peak_bytes,
        disk_bytes=plan.nbytes + prepared.tuning_sizes.disk,
        disk_free=free_bytes(out),
        method="rtn" if prepared.request.tuning is None else "autoround",
        timing=estimate(prepared, out, torch.device(kind)) if here else None,
        device=kind,
        tensors=_tensors(plan),
        layers=tuple(map(_layer, (on_gpu if kind == "cuda" else on_cpu).units)),
        cpu=_memory(on_cpu, None),
        gpu=_memory(on_gpu, torch.cuda.mem_get_info()[0] if has_gpu else None),
        notes=plan.notes,
        quantized=plan.quantized,
        dense=plan.dense,
    )


def _tensors(plan: Plan) -> tuple[TensorPlan, ...]:
    found: dict[tuple[str, tuple[int, ...], str, int | None], list[int]] = {}
    for step in plan.steps:
        key: tuple[str, tuple[int, ...], str, int | None]
        if isinstance(step, Quantize):
            entry = step.entry
            key = (pattern(step.module), (entry.n, entry.k), f"INT{entry.bits}", entry.scheme.group)
        else:
            key = (pattern(step.name), step.shape, "BF16", None)
        found.setdefault(key, []).append(sum(tensor.nbytes for tensor in step.outputs()))
    return tuple(TensorPlan(*key, len(sizes), sum(sizes)) for key, sizes in found.items())


def _memory(found: Needs, free: int | None) -> Memory:
    return Memory(found.weights, found.cache, found.spare, found.context, free)


def _layer(served: KernelUse) -> LayerPlan:
    matrix = served.matrix
    group = None if matrix.group == matrix.k else matrix.group
    scheme = None if matrix.bits == 16 else Scheme(matrix.bits, group)
    return LayerPlan(
        units=served.units,
        count=served.count,
        n=matrix.n,
        k=matrix.k,
        bits=matrix.bits,
        group=group,
        kernel=served.kernel,
        fallback=served.fallback,
        vllm=vllm_fit(matrix.n, matrix.k, scheme) if scheme else None,
        sglang=sglang_fit(matrix.n, matrix.k, scheme) if scheme else None,
    )
