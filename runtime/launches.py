"""Which kernels a model's texts will launch on a GPU, and compiling them without using it.

Which kernels these are is heard, not listed: the engine itself runs on tensors without memory, and a hook of Triton's
notes what would be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import PackedWeight, packed_words
from lbq.formats.spec import ModelSpec
from lbq.runtime.ahead import Job
from lbq.runtime.binding import Binder
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import CudaDevice
from lbq.runtime.fused.engine import FusedEngine
from lbq.runtime.kernels.gpu import Gpu, meaning

META = torch.device("meta")
_DEVICES = count(1)  # none of them real, and each in use once: an id would be given again


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it is to be compiled for, as Triton writes it."""

    function: Any
    specialization: str

    def compile(self) -> Any:
        """Triton's compiled kernel."""
        return self.function.preload(self.specialization)


class Outline:
    """:class:`lbq.runtime.binding.Weights` without memory."""

    def __init__(self, spec: ModelSpec, quantized: Mapping[str, QuantizedModule]) -> None:
        self.spec = spec
        self._quantized = quantized
        self._shapes: dict[str, tuple[int, ...]] = {f"{spec.embedding}.weight": (spec.vocab_size, spec.hidden_size)}
        self._shapes |= {f"{name}.weight": (width,) for name, width in spec.norms()}
        for p in spec.projections():
            self._shapes[f"{p.name}.bias"] = (p.out_features,)
            self._shapes[f"{p.name}.weight"] = (p.out_features, p.in_features)

    def is_quantized(self, module: str) -> bool:
        return module in self._quantized

    def packed(self, module: str) -> PackedWeight:
        entry = self._quantized[module]
        words = torch.empty((entry.n, packed_words(entry.k, entry.bits)), dtype=torch.int32, device=META)
        scales = torch.empty((entry.n, entry.k // entry.group), dtype=torch.bfloat16, device=META)
        return PackedWeight(words, scales, entry.bits, entry.group, entry.k)

    def dense(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device=META)

    def release(self, module: str) -> None:
        """Nothing to do."""

    def release_dense(self, name: str) -> None:
        """Nothing to do."""


def kernels_of(job: Job) -> list[Kernel]:
    """Every kernel that ``job`` will launch, in the order in which it first does; little if it has no fused step."""
    device = CudaDevice(exact=False, kv_cache=job.kv_cache, device=META)

    def run() -> None:
        engine = device.engine(_outline(job.spec, job.quantized, device), job.context)
        if isinstance(engine, FusedEngine):
            engine.rehearse(job.prompts, job.ways)

    with meaning(job.gpu), standing_in(job.gpu):
        return heard(run)


def _outline(spec: ModelSpec, quantized: Mapping[str, QuantizedModule], device: CudaDevice) -> Decoder:
    """A decoder of ``spec`` without memory, and without layers that lie between equal ones."""
    binder = Binder(Outline(spec, quantized), device)

    def kind(i: int) -> object:
        units = spec.layer_units(i)
        return spec.layer(i), [quantized[unit[0].name].scheme if unit[0].name in quantized else None for unit in units]

    kinds = [None, *(kind(i) for i in range(len(spec.layers))), None]
    kept = [i for i in range(len(spec.layers)) if not kinds[i] == kinds[i + 1] == kinds[i + 2]]
    embedding = binder.embedding()
    return Decoder(spec, embedding, [binder.layer(i) for i in kept], binder.norm(), binder.head(embedding))


def heard(run: Callable[[], None]) -> list[Kernel]:
    """The kernels that ``run`` would compile; it launches none of them."""
    found: dict[Kernel, None] = {}

    def hook(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        found[Kernel(fn.jit_function, compile["specialization_data"])] = None
        return True  # neither compile it nor launch it

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


class _Driver:
    """A GPU of a certain kind to Triton, as far as compiling goes."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self._device = -next(_DEVICES)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device  # what is compiled for it is kept apart from all else

    def get_current_stream(self, device: object) -> int:  # noqa: ARG002
        return 0


@contextmanager
def standing_in(gpu: Gpu) -> Iterator[None]:
    """Triton compiles for ``gpu``, in all threads of this process."""
    before = driver._active
    driver.set_active(_Driver(GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)))
    try:
        yield
    finally:
        driver._active = before


def compile_kernels(job: Job, turns: Iterator[int]) -> None:
    """Compile those kernels of a job whose numbers ``turns`` gives, until it gives one that there is not."""
    kernels = kernels_of(job)
    with standing_in(job.gpu):
        for turn in turns:
            if turn >= len(kernels):
                return
            _make_launcher(kernels[turn].compile())


def _make_launcher(compiled: Any) -> None:
    """Triton 3.6 has C compiled for every kernel's signature when it is first launched; later ones have not."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        with suppress(Exception):  # whoever launches it hears what is wrong
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
