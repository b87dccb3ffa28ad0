"""A checkpoint quantised when it is used: the weights of an artifact, and no artifact on disk.

A linear layer is read and rounded to nearest each time it is asked for; codes and scales are those that a conversion
with the same request writes.
"""

from __future__ import annotations

from types import TracebackType

import torch

from lbq.formats.packing import PackedWeight
from lbq.quantizer import heap, tensors
from lbq.quantizer.plan import Keep, Quantize
from lbq.quantizer.prepare import Prepared
from lbq.quantizer.writing import OnProgress


class QuantizedOnLoad:
    """A prepared conversion in the form in which a runtime takes weights. ``device`` is where rounding is done and
    where codes end up. ``on_progress`` hears of every tensor that has been read."""

    def __init__(self, prepared: Prepared, device: torch.device, on_progress: OnProgress | None = None) -> None:
        self.folder = prepared.source.folder
        self.spec = prepared.plan.spec
        self.notes = prepared.plan.notes
        self.plan = prepared.plan
        self._checkpoint = prepared.checkpoint
        self._device = device
        self._on_progress = on_progress
        self.quantized = self.plan.quantized
        self._quantized = {step.module: step for step in self.plan.steps if isinstance(step, Quantize)}
        self._dense = {step.name: step for step in self.plan.steps if isinstance(step, Keep)}

    def is_quantized(self, module: str) -> bool:
        """Whether the linear layer becomes codes; False for a name that is unknown, too."""
        return module in self._quantized

    def packed(self, module: str) -> PackedWeight:
        """Codes and scales of a linear layer, made now. Raises DataError for a weight that has no code."""
        step = self._quantized[module]
        packed = tensors.quantized(self._checkpoint, step, self._device, to=self._device)
        self._done(step)
        return packed

    def dense(self, name: str) -> torch.Tensor:
        """A tensor by its full name, as BF16. Raises DataError for NaN and infinity."""
        step = self._dense[name]
        tensor = tensors.dense(self._checkpoint, step)
        self._done(step)
        return tensor

    def release(self, module: str) -> None:
        """Nothing to do: codes do not lie in the file, whose pages were given back when they were made."""
        del module

    def release_dense(self, name: str) -> None:
        """Drop the resident pages of a BF16 tensor."""
        self._checkpoint.release(self._dense[name].source)

    def _done(self, step: Quantize | Keep) -> None:
        """Drop the resident pages of a tensor that was read, which are read again by whoever looks into the file, and
        what was needed on the way."""
        self._checkpoint.release(step.source)
        heap.give_back()
        if self._on_progress is not None:
            name = step.module if isinstance(step, Quantize) else step.name
            self._on_progress(name, self._checkpoint.info(step.source).nbytes)

    def close(self) -> None:
        """Unmap what nobody uses any more."""
        self._checkpoint.close()

    def __enter__(self) -> QuantizedOnLoad:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
