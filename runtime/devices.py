"""What a device brings: its kernels, its engine, the dtype of its cache; and how its failures are told."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from lbq.formats.errors import DeviceError, UsageError
from lbq.formats.packing import PackedWeight
from lbq.formats.spec import ModelSpec
from lbq.runtime.batch import OneByOne
from lbq.runtime.cache import KVCache
from lbq.runtime.decoder import Decoder, Layers
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import BUCKET, CudaEngine
from lbq.runtime.kernels.gpu import gpu_of
from lbq.runtime.kernels.linear import Choice, Linear, Matrix
from lbq.runtime.text.batch import Batch
from lbq.runtime.text.generation import Engine

CUDA_CONTEXT = 8192  # the default there: a cache that cannot grow should not take a GPU's memory unasked
LONG_CONTEXT = 8192  # a longer one is kept in int8 by default: half the memory, and faster than float16 once it is full
CUDA_SPARE = 1 << 30  # bytes left for prompts' activations, graphs and workspaces
CUDA_CAPABILITY = (8, 0)  # bfloat16 in the tensor cores


CacheKind = Literal["auto", "float", "int8", "int4"]
KEPT_AS = {"int8": torch.int8, "int4": torch.uint8}  # two to a byte


@dataclass(frozen=True)
class CpuDevice:
    """Weights stay mapped where the kernels can use them in place; the cache is float32 and grows with the text."""

    exact: bool
    note: str | None = None  # why a GPU that is there is not used
    kv_cache: CacheKind = "auto"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cpu import cpu_linear

        return cpu_linear(weight, bias, exact=self.exact)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cpu import DenseLinear

        return DenseLinear(weight, bias, exact=self.exact)

    def choose(self, matrix: Matrix) -> Choice:
        """What :meth:`packed`, or at 16 bits :meth:`dense`, will make of a matrix."""
        from lbq.runtime.kernels.cpu import choose

        return choose(matrix, exact=self.exact)

    def cache_dtype(self, context: int, decoder: Decoder | None = None) -> torch.dtype:  # noqa: ARG002
        """What keys and values are kept as."""
        return KEPT_AS.get(self.kv_cache, torch.float32)

    def default_context(self, decoder: Decoder) -> int:
        return decoder.spec.context

    def check_context(self, decoder: Decoder, context: int) -> None:
        """Nothing: the cache grows with the text."""

    def check_cache(self, spec: ModelSpec) -> None:
        """Nothing: any cache can be opened."""

    def prepare(self, nbytes: int) -> None:
        """Nothing: weights stay mapped."""

    def cache_fallback(self, decoder: Decoder) -> str | None:  # noqa: ARG002
        """Why keys and values are not read as they are kept, or None where they are."""
        return _opened(self.kv_cache)

    def step_fallback(self, decoder: Decoder) -> str | None:  # noqa: ARG002
        """Nothing: there is one way to decode."""
        return None

    def prompt_fallback(self, decoder: Decoder) -> str | None:  # noqa: ARG002
        """Nothing: there is one way to take in a prompt."""
        return None

    def engine(self, decoder: Decoder, context: int) -> Engine:
        return DecoderEngine(decoder, context, cache_dtype=self.cache_dtype(context))

    def batch_fallback(self, decoder: Decoder, places: int) -> str | None:  # noqa: ARG002
        """Why several texts do not share a pass over the weights."""
        return "on a CPU every text takes a pass over the weights of its own"

    def most_places(self, decoder: Decoder, context: int) -> int:  # noqa: ARG002
        """How many texts of up to ``context`` tokens gain by being decoded together."""
        return 1

    def batch(self, decoder: Decoder, context: int, places: int) -> Batch:
        return OneByOne(partial(self.engine, decoder, context), places, self.batch_fallback(decoder, places))


@dataclass(frozen=True)
class CudaDevice:
    """Weights are moved once; the cache is allocated at once: float16 (float32 when ``exact``), and int8 where more
    than LONG_CONTEXT tokens are asked for and the fused step runs, which reads it.

    What rounding keys and values costs, as KL divergence to float32: float16 4e-7 on SmolLM2-135M and 1e-6 on
    Qwen2.5-Coder-0.5B; bfloat16 3e-5 and 8e-4; int8 2e-4 and 4e-4, see docs/performance.md. The largest key there,
    biases of Qwen2 included, was 215; float16 goes to 65504, and past it the logits are not finite, which ends the text
    with an error.
    """

    exact: bool
    note: str | None = None
    kv_cache: CacheKind = "auto"
    fused: bool = True  # decode by ``lbq.runtime.fused`` and take prompts by ``lbq.runtime.prompts`` where they can
    device: torch.device = field(default_factory=partial(torch.device, "cuda"))  # or "meta": the same without memory

    def cache_dtype(self, context: int, decoder: Decoder | None = None) -> torch.dtype:
        """What keys and values of up to ``context`` tokens are kept as; of a decoder that fuses where none is given."""
        if self.exact:
            return torch.float32
        long = self.kv_cache == "auto" and context > LONG_CONTEXT and self.fused
        kind = "int8" if long and (decoder is None or self._fuses(decoder)) else self.kv_cache
        return KEPT_AS.get(kind, torch.float16)

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cuda import CudaLinear

        return CudaLinear(weight.to(self.device), bias, exact=self.exact)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cuda import DenseCudaLinear

        return DenseCudaLinear(weight.to(self.device), bias, exact=self.exact)

    def choose(self, matrix: Matrix) -> Choice:
        """What :meth:`packed`, or at 16 bits :meth:`dense`, will make of a matrix; needs no GPU."""
        from lbq.runtime.kernels.cuda import choose

        return choose(matrix, exact=self.exact)

    def default_context(self, decoder: Decoder) -> int:
        """What fits beside the weights, which are there already."""
        return fitting_context(decoder.spec.context, self._token_bytes(decoder, CUDA_CONTEXT), _free_bytes())

    def check_context(self, decoder: Decoder, context: int) -> None:
        """Raise DeviceError for a context whose keys and values the memory that is left does not hold."""
        fours = "int4" if self.int4_trouble(decoder.spec) is None else None
        smaller = {torch.int8: fours, torch.uint8: None}.get(self.cache_dtype(context, decoder), "int8")
        check_fit(context, partial(self._token_bytes, decoder), _free_bytes(), smaller)

    def check_cache(self, spec: ModelSpec) -> None:
        """Raise DeviceError for keys and values that this GPU has no room to attend to, before there are weights."""
        trouble = self.int4_trouble(spec) if self.kv_cache == "int4" else None
        if trouble is not None:
            raise DeviceError(f"keys and values in int4: {trouble}: try --kv-cache int8")

    def int4_trouble(self, spec: ModelSpec) -> str | None:
        """Why this GPU cannot attend to int4 keys and values of ``spec``, or None where it can, or opens them first."""
        widest = max(kind.mixer.head_dim for kind in spec.layer_kinds)
        gpu = gpu_of(self.device) if self.fused and not self.exact and widest > 128 else None
        if gpu is None:
            return None
        from lbq.runtime.kernels.attention import Heads, no_room, why_not

        heads = [Heads.of(kind.mixer) for kind in spec.layer_kinds]
        if any(map(why_not, heads)):  # such steps are not fused
            return None
        return next(filter(None, (no_room(each, 4, gpu) for each in heads)), None)

    def prepare(self, nbytes: int) -> None:
        """For so many bytes of weights that are going to be moved: a call for the memory of each of their matrices
        takes as long as moving them, so torch takes it at once. And kernels get the hashes by which they are cached."""
        from lbq.runtime.kernels.hashes import settle

        settle()
        with suppress(torch.OutOfMemoryError):  # what does not fit is said where it is needed
            torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def cache_fallback(self, decoder: Decoder) -> str | None:
        """Why keys and values are not read as they are kept, or None where they are."""
        return None if self._fuses(decoder) else _opened(self.kv_cache)

    def _token_bytes(self, decoder: Decoder, context: int) -> int:
        """Keys and values of a token in all layers, where up to ``context`` are kept; and where they are in few bits a
        layer's opened ones, which prompts see."""
        state = decoder.new_state(BUCKET, dtype=self.cache_dtype(context, decoder), fixed=True)
        opened = max(
            (2 * layer.kv.numel() for layer in state.layers if isinstance(layer, KVCache) and layer.turn), default=0
        )
        return (state.nbytes + opened) // BUCKET

    def step_fallback(self, decoder: Decoder) -> str | None:
        """Why ``decoder`` does not decode by the fused step, where that is not what was asked for."""
        if self.exact or not self.fused:
            return None
        from lbq.runtime.fused.step import why_not

        return why_not(decoder)

    def prompt_fallback(self, decoder: Decoder) -> str | None:
        """Why prompts of ``decoder`` do not go by kernels of their own, where that is not what was asked for."""
        if self.exact or not self.fused:
            return None
        from lbq.runtime.prompts import why_not

        return why_not(decoder)

    def _fuses(self, decoder: Decoder) -> bool:
        """Whether ``decoder`` decodes by the fused step, whose attention reads int8."""
        return self.fused and not self.exact and self.step_fallback(decoder) is None

    def engine(self, decoder: Decoder, context: int) -> Engine:
        layers = self._prompt_layers(decoder)
        if not self._fuses(decoder):
            return CudaEngine(decoder, context, cache_dtype=self.cache_dtype(context, decoder), layers=layers)
        from lbq.runtime.fused.engine import FusedEngine

        return FusedEngine(decoder, context, cache_dtype=self.cache_dtype(context, decoder), layers=layers)

    def batch_fallback(self, decoder: Decoder, places: int) -> str | None:
        """Why several texts do not share a pass over the weights, or None where they do."""
        if not self._fuses(decoder):
            return "the fused step does not run"
        from lbq.runtime.fused.step import why_not

        return why_not(decoder, places)

    def most_places(self, decoder: Decoder, context: int) -> int:
        """How many texts of up to ``context`` tokens gain by being decoded together, and fit the memory left."""
        if self.batch_fallback(decoder, 2) is not None:
            return 1
        from lbq.runtime.kernels.batch import TOKENS

        free = _free_bytes() - CUDA_SPARE
        return max(1, min(TOKENS, free // (context * self._token_bytes(decoder, context))))

    def batch(self, decoder: Decoder, context: int, places: int) -> Batch:
        fallback = self.batch_fallback(decoder, places)
        if fallback is not None:
            return OneByOne(partial(self.engine, decoder, context), places, fallback)
        from lbq.runtime.fused.batch import FusedBatch

        layers, dtype = self._prompt_layers(decoder), self.cache_dtype(context, decoder)
        return FusedBatch(decoder, context, places, cache_dtype=dtype, layers=layers)

    def _prompt_layers(self, decoder: Decoder) -> Layers | None:
        """How many tokens at a time are taken in, where that is not by the decoder's own layers."""
        if self.exact or not self.fused or self.prompt_fallback(decoder) is not None:
            return None
        from lbq.runtime.prompts import PromptLayers

        return PromptLayers(decoder)


Device = CpuDevice | CudaDevice


def set_threads(threads: int) -> None:
    """Set torch's number of CPU threads, for the whole process. Raises UsageError for what makes no sense."""
    most = 4 * (os.cpu_count() or 1)
    if not (isinstance(threads, int) and 1 <= threads <= most):
        raise UsageError(f"{threads} threads: this machine takes 1 to {most}")
    torch.set_num_threads(threads)


def fitting_context(most: int, token_bytes: int, free: int) -> int:
    """The context that ``free`` bytes hold: at most ``most`` and CUDA_CONTEXT, and one bucket whatever is free."""
    fitting = (free - CUDA_SPARE) // token_bytes // BUCKET * BUCKET
    return min(most, CUDA_CONTEXT, max(fitting, BUCKET))


def check_fit(context: int, token_bytes: Callable[[int], int], free: int, smaller: str | None) -> None:
    """Raise DeviceError for a context that ``free`` bytes do not hold beside the least that prompts and graphs need.

    ``token_bytes``: of a token where so many are kept; ``smaller``: the kind of cache that takes less, if there is one.
    """
    room = max(0, free - CUDA_SPARE // 2)  # an 8B model takes in prompts with 0.42 GB
    wanted = context * token_bytes(context)
    if wanted <= room:
        return
    shorter = room // token_bytes(context)
    shorter = min(shorter, room // token_bytes(shorter)) // BUCKET * BUCKET  # short ones may be kept in more bits
    ways = (
        ([f"--context {shorter}"] if shorter else [])
        + ([f"--kv-cache {smaller}"] if smaller else [])
        + ["--device cpu"]
    )
    raise DeviceError(
        f"a context of {context} tokens takes {wanted / 1e9:.1f} GB of keys and values, and the GPU has "
        f"{room / 1e9:.1f} GB left beside the weights: try {', or '.join(ways)}"
    )


def _opened(kind: CacheKind) -> str | None:
    return (
        f"no kernel here reads {kind} keys and values: they are all opened for every token" if kind in KEPT_AS else None
    )


def _free_bytes() -> int:
    torch.cuda.empty_cache()  # else what loading used for a while counts as taken
    return torch.cuda.mem_get_info()[0]


def find_device(name: Literal["auto", "cpu", "cuda"], *, exact: bool, kv_cache: CacheKind = "auto") -> Device:
    """``auto`` is a GPU that lbq can use; where there is one that it cannot, the CPU's ``note`` says why.

    Raises DeviceError for ``cuda`` where there is none to use, UsageError for any other name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name}: auto, cpu or cuda")
    if kv_cache not in ("auto", "float", *KEPT_AS):
        raise UsageError(f"kv_cache {kv_cache}: auto, float, int8 or int4")
    if exact and kv_cache in KEPT_AS:
        raise UsageError(f"{kv_cache} keys and values do not go with float32, which keeps them as they are")
    if name == "cpu":
        return CpuDevice(exact, kv_cache=kv_cache)
    if not torch.cuda.is_available():
        if name == "auto":
            return CpuDevice(exact, kv_cache=kv_cache)
        raise DeviceError(f"device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    trouble = _gpu_trouble()
    if trouble is None:
        return CudaDevice(exact, kv_cache=kv_cache)
    if name == "auto":
        return CpuDevice(exact, kv_cache=kv_cache, note=f"the GPU is not used: {trouble}")
    raise DeviceError(f"device {name}: {trouble}; or use --device cpu")


def device_or_absent(name: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device to say something about: as :func:`find_device`, but ``cuda`` need not be here."""
    if name == "cuda" and not torch.cuda.is_available():
        return CudaDevice(exact=False)
    return find_device(name, exact=False)


def _gpu_trouble() -> str | None:
    if torch.version.hip is not None:
        return "torch is built for ROCm, and lbq's kernels need an NVIDIA GPU"
    with device_errors():  # the first call to the driver
        found = torch.cuda.get_device_capability()
    if found < CUDA_CAPABILITY:
        needed = ".".join(map(str, CUDA_CAPABILITY))
        return f"its compute capability is {found[0]}.{found[1]}, and lbq's kernels need {needed} (Ampere or later)"
    named = os.environ.get("CC")  # Triton takes this alone where it is set, else one of the two
    if not any(map(shutil.which, ("gcc", "clang") if named is None else (named,))):
        what = "there is none" if named is None else f"CC={named!r} is none"
        return f"Triton needs a C compiler and {what}; install gcc and the headers of Python"
    return None


@contextmanager
def device_errors(smaller: str = "try a shorter --context N, or --device cpu") -> Iterator[None]:
    """Turn failures of a device, and memory that runs out, into DeviceError; other errors pass. ``smaller`` is what to
    do where memory runs out."""
    try:
        yield
    except Exception as error:
        message = _device_message(error, smaller)
        if message is None:
            raise
        raise DeviceError(message) from error


def _device_message(error: Exception, smaller: str) -> str | None:
    """One line and what to try, or None for what is no fault of a device."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory: {smaller}"
    if isinstance(error, subprocess.CalledProcessError):  # Triton builds what launches its kernels
        return "Triton's C compiler failed: install gcc and the headers of Python, or use --device cpu"
    if isinstance(error, torch.AcceleratorError) or _is_tritons(error):
        return f"the GPU fails: {type(error).__name__}: {text[:300]}; try --device cpu"
    if isinstance(error, RuntimeError):
        if "DefaultCPUAllocator" in text:
            return f"out of memory: {smaller}"
        if any(word in text for word in ("CUDA", "CUBLAS", "cuBLAS", "C compiler")):  # libraries have no type of theirs
            return f"the GPU fails: {text[:300]}; try --device cpu"
    return None


def _is_tritons(error: Exception) -> bool:
    """Without importing it: on the CPU nothing else needs Triton."""
    return any(kind.__module__.partition(".")[0] == "triton" for kind in type(error).__mro__)
