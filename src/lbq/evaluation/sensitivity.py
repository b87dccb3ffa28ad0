"""What quantising one fused unit alone, all else as in the original, does to the next-token distributions.

Every free unit at every number of bits is a student of its own, of the codes that a conversion would write, round to
nearest. It differs from the teacher in one layer, so it costs what comes behind that layer, and nothing before it:
see :mod:`lbq.evaluation.stream`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from lbq.evaluation.mixed import Freedom, FreeUnit
from lbq.evaluation.scores import KlScorer, estimate
from lbq.evaluation.stream import HIDDEN_BYTES, OnProgress, Side, read
from lbq.evaluation.windows import Windows
from lbq.formats.packing import PackedWeight
from lbq.formats.quality import Sensitivity
from lbq.formats.safetensors_file import Checkpoint
from lbq.formats.spec import ModelSpec
from lbq.quantizer import tensors
from lbq.quantizer.original import Original
from lbq.quantizer.plan import Quantize, keep_all
from lbq.runtime.devices import Device

FEWEST = 8  # students that read together, whatever their hidden states take: each time the teacher reads along


class OneUnit:
    """An original with one fused unit quantised, in the form in which a runtime takes weights."""

    def __init__(
        self, original: Original, checkpoint: Checkpoint, steps: Sequence[Quantize], device: torch.device
    ) -> None:
        self._original, self._checkpoint, self._device = original, checkpoint, device
        self._steps = {step.module: step for step in steps}
        head = original.spec.head.name in self._steps
        self.spec: ModelSpec = msgspec.structs.replace(original.spec, tied=False) if head else original.spec

    def is_quantized(self, module: str) -> bool:
        """Whether it is of the unit."""
        return module in self._steps

    def packed(self, module: str) -> PackedWeight:
        """Codes and scales, made now. Raises DataError for a weight that has no code."""
        return tensors.quantized(self._checkpoint, self._steps[module], self._device, to=self._device)

    def dense(self, name: str) -> torch.Tensor:
        """The original's tensor."""
        return self._original.dense(name)

    def release(self, module: str) -> None:
        """Drop the resident pages of the weight that ``module`` was made from."""
        self._checkpoint.release(self._steps[module].source)

    def release_dense(self, name: str) -> None:
        """Drop the resident pages of a tensor."""
        self._original.release_dense(name)


def measure(
    freedom: Freedom,
    windows: Windows,
    device: Device,
    *,
    on_progress: OnProgress | None = None,
    hidden_bytes: int = HIDDEN_BYTES,
) -> tuple[Sensitivity, ...]:
    """The divergence that each free unit causes at each of its bits, unit by unit, in the order of ``freedom.units``.

    ``device`` should be exact. Students read in groups whose hidden states take about ``hidden_bytes``. Raises
    DataError for a weight that has no code.
    """
    prepared = freedom.prepared
    checkpoint = prepared.checkpoint
    plan = keep_all(prepared.source_spec, checkpoint, prepared.head_differs)
    original = Original(prepared.source, checkpoint, plan)
    teacher = Side(str(prepared.source.folder), original)
    tried = [(unit, bits) for unit in freedom.units for bits in unit.steps]
    each = len(windows) * windows.context * original.spec.hidden_size * 4
    many = max(FEWEST, hidden_bytes // each - 1)
    found: list[Sensitivity] = []
    for start in range(0, len(tried), many):
        some = tried[start : start + many]
        scorers = [KlScorer(windows.positions) for _ in some]
        read(
            teacher,
            [_student(teacher, original, checkpoint, unit, bits, device) for unit, bits in some],
            windows,
            device,
            scorers,
            on_progress=_part(on_progress, start, len(some), len(tried)),
            hidden_bytes=hidden_bytes,
        )
        for (unit, bits), scorer in zip(some, scorers, strict=True):
            group = unit.group(bits)
            kl = estimate(scorer.kl(), len(windows))
            found.append(Sensitivity(unit.modules, bits, group, unit.nbytes(bits), kl))
    return tuple(found)


def _student(
    teacher: Side, original: Original, checkpoint: Checkpoint, unit: FreeUnit, bits: int, device: Device
) -> Side:
    weights = OneUnit(original, checkpoint, unit.steps[bits], device.device)
    return Side(f"{teacher.name}, {unit.modules[0]} at {bits} bits", weights, frozenset({unit.layer}))


def _part(tell: OnProgress | None, start: int, count: int, total: int) -> OnProgress | None:
    """Progress of ``count`` students behind ``start`` others, of ``total``."""
    if tell is None:
        return None
    return lambda done, of: tell(start + count * done // of, total)
