"""What a model will need to run, and which kernels will serve it, before there are weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import packed_words
from lbq.formats.spec import ModelSpec, Projection
from lbq.runtime.binding import KernelUse, held_bytes, unit_matrix, unit_names
from lbq.runtime.cache import PACKED, width_of
from lbq.runtime.devices import CUDA_CONTEXT, CUDA_SPARE, Device
from lbq.runtime.kernels.linear import Choice, Matrix


@dataclass(frozen=True)
class Needs:
    """Bytes of memory, and the kernels of :func:`lbq.runtime.binding.bind`.

    ``stored``: of linear layers as files have them, which a token reads at least. ``weights``: of linear layers in the
    kernels' arrangement and, on a GPU, the embedding, which a CPU reads from the mapped file. ``cache``: of one text of
    ``context`` tokens. ``spare``: for activations, graphs and workspaces on a GPU.
    """

    units: tuple[KernelUse, ...]
    stored: int
    weights: int
    cache: int
    context: int
    spare: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.spare


def needs(
    spec: ModelSpec, quantized: Mapping[str, QuantizedModule], device: Device, context: int | None = None
) -> Needs:
    """What ``device``, which need not be there, will hold of a model whose linear layers are ``quantized`` or BF16.

    ``context`` is by default what a GPU takes unasked where its memory allows it.
    """
    counts: dict[tuple[str, Matrix, Choice], int] = {}
    on_gpu = device.device.type == "cuda"
    weights = 2 * spec.vocab_size * spec.hidden_size if on_gpu and not spec.tied else 0
    for unit in spec.units():
        matrix = _matrix(unit, quantized)
        choice = device.choose(matrix)
        key = (unit_names(unit), matrix, choice)
        counts[key] = counts.get(key, 0) + 1
        weights += held_bytes(choice, len(unit), _stored_bytes(matrix))
    context = context or min(spec.context, CUDA_CONTEXT)
    cache = context * _token_bytes(spec, device.cache_dtype(context))
    units = tuple(KernelUse(name, matrix, by.kernel, by.fallback, n) for (name, matrix, by), n in counts.items())
    stored = sum(served.count * _stored_bytes(served.matrix) for served in units)
    return Needs(units, stored, weights, cache, context, CUDA_SPARE if on_gpu else 0)


def _matrix(unit: tuple[Projection, ...], quantized: Mapping[str, QuantizedModule]) -> Matrix:
    entry = quantized.get(unit[0].name)
    return unit_matrix(unit, 16) if entry is None else unit_matrix(unit, entry.bits, entry.group)


def stored_bytes(unit: tuple[Projection, ...], quantized: Mapping[str, QuantizedModule]) -> int:
    """Bytes of a fused unit's weights as files have them."""
    return _stored_bytes(_matrix(unit, quantized))


def _stored_bytes(matrix: Matrix) -> int:
    if matrix.bits == 16:
        return 2 * matrix.n * matrix.k
    return matrix.n * (4 * packed_words(matrix.k, matrix.bits) + 2 * (matrix.k // matrix.group))


def _token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Keys and values of a token in all layers, and their scales."""
    mixers = [spec.layer(i).mixer for i in range(len(spec.layers))]
    scale_bytes = 4 if dtype in PACKED else 0
    return sum(
        2 * mixer.kv_heads * (width_of(mixer.head_dim, dtype) * dtype.itemsize + scale_bytes) for mixer in mixers
    )
