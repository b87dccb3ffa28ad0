"""Weights that are compared with the original's when a runtime takes them: no second pass over either."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.formats.spec import ModelSpec
from lbq.quantizer.measure import Meter, Totals
from lbq.quantizer.tensors import CPU_BLOCK
from lbq.runtime.binding import Weights

Rows = Callable[[int, int], torch.Tensor]  # rows [a, b) of a matrix, float32, the caller's own


class Metered:
    """Passes weights through; of each linear layer the first time is measured, on ``device``.

    ``original`` has layers of the same names and shapes; whether heads are tied to embeddings may differ.
    """

    def __init__(self, weights: Weights, original: Weights, device: torch.device) -> None:
        self.spec = weights.spec
        self._weights, self._original, self._device = weights, original, device
        self._pending = {_tensor(weights.spec, p.name): p.name for p in weights.spec.projections()}
        self._rows = {p.name: p.out_features for p in weights.spec.projections()}
        self._totals = Totals()

    @property
    def cosine(self) -> float:
        """Of all linear layers' weights with the original's, once all have been taken."""
        assert not self._pending
        return self._totals.cosine

    def is_quantized(self, module: str) -> bool:
        """See :class:`Weights`."""
        return self._weights.is_quantized(module)

    def packed(self, module: str) -> PackedWeight:
        """See :class:`Weights`."""
        packed = self._weights.packed(module)
        self._measure(_tensor(self.spec, module), lambda a, b: packed.rows(a, b).dequantize())
        return packed

    def dense(self, name: str) -> torch.Tensor:
        """See :class:`Weights`."""
        tensor = self._weights.dense(name)
        self._measure(name, lambda a, b: tensor[a:b])
        return tensor

    def release(self, module: str) -> None:
        """See :class:`Weights`."""
        self._weights.release(module)

    def release_dense(self, name: str) -> None:
        """See :class:`Weights`."""
        self._weights.release_dense(name)

    def _measure(self, name: str, rows: Rows) -> None:
        module = self._pending.pop(name, None)
        if module is None:
            return
        original, meter, total = self._original_rows(module), Meter(), self._rows[module]
        step = max(1, CPU_BLOCK // rows(0, 1).shape[1])
        for start in range(0, total, step):
            stop = min(start + step, total)
            wanted, found = (part(start, stop).to(self._device, torch.float32) for part in (original, rows))
            meter.add(wanted, found.clone())  # which is overwritten
        self._totals.source += meter.source
        self._totals.result += meter.result
        self._totals.error += meter.error
        if self._original.is_quantized(module):
            self._original.release(module)
        else:
            self._original.release_dense(_tensor(self._original.spec, module))

    def _original_rows(self, module: str) -> Rows:
        if self._original.is_quantized(module):
            packed = self._original.packed(module)
            return lambda a, b: packed.rows(a, b).dequantize()
        tensor = self._original.dense(_tensor(self._original.spec, module))
        return lambda a, b: tensor[a:b]


def check_layers(name: str, spec: ModelSpec, original: ModelSpec) -> None:
    """Raise DataError unless a model has its original's linear layers."""
    ours, theirs = ({p.name: (p.out_features, p.in_features) for p in each.projections()} for each in (spec, original))
    odd = sorted(layer for layer in ours.keys() | theirs.keys() if ours.get(layer) != theirs.get(layer))
    if odd:
        raise DataError(f"{name}: {odd[0]} is not as in the original; compare models of the same original")


def _tensor(spec: ModelSpec, module: str) -> str:
    """The tensor that holds a linear layer's weight, were it dense."""
    return f"{spec.embedding if spec.tied and module == spec.head.name else module}.weight"
