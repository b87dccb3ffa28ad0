"""From the steps of a plan to safetensors files, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lbq.formats.disk import FileEntry
from lbq.formats.manifest import Summary
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.measure import Measured, Meter, Totals
from lbq.quantizer.methods import Weights
from lbq.quantizer.plan import Keep, Plan, Quantize
from lbq.quantizer.shards import Shards

OnProgress = Callable[[str, int], None]  # name of the tensor, bytes of the source that were consumed


@dataclass(frozen=True)
class Written:
    """The files with the tensors, what was measured of each quantised layer, and hashes of what was read, as far as
    they are known."""

    files: Mapping[str, FileEntry]
    modules: Mapping[str, Measured]
    finish: Callable[[], None]  # tidies up once the artifact stands
    sources: Mapping[str, FileEntry] = field(default_factory=dict)

    def summary(self, plan: Plan) -> Summary:
        """The manifest's; sums in the order of the plan, whatever order things were done in."""
        totals = Totals()
        for module, entry in plan.quantized.items():
            totals.include(self.modules[module], entry)
        return totals.summary(plan.bits_per_weight)


def write_step(
    step: Quantize | Keep, checkpoint: Checkpoint, weights: Weights, shards: Shards, on_progress: OnProgress
) -> Measured | None:
    """Write what becomes of one tensor; gives what was measured, if it was quantised."""
    measured = None
    if isinstance(step, Keep):
        shards.write(step.name, weights.dense(step))
        on_progress(step.name, checkpoint.info(step.source).nbytes)
    else:
        meter = Meter()
        packed = _quantized(step, checkpoint, weights, meter, on_progress)
        for output, tensor in zip(step.outputs(), packed, strict=True):
            shards.write(output.name, tensor)
        measured = meter.measured(step.module, step.entry)
    checkpoint.release(step.source)
    return measured


def _quantized(
    step: Quantize, checkpoint: Checkpoint, weights: Weights, meter: Meter, on_progress: OnProgress
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales and shape of one linear layer; the meter sees every block of rows."""
    row_bytes = checkpoint.info(step.source).nbytes // step.entry.n

    def measure(block: torch.Tensor, packed: PackedWeight) -> None:
        meter.add(block, packed.dequantize())
        on_progress(step.module, packed.n * row_bytes)

    packed = weights.packed(step, measure)
    return packed.words, packed.scales, torch.tensor([step.entry.n, step.entry.k], dtype=torch.int64)
