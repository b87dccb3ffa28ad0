"""What every free unit of a conversion does alone, and bits chosen from it: ``--target-bpw`` and full reports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from lbq.evaluation.mixed import Chosen, Freedom
from lbq.evaluation.models import text_of, windows_of
from lbq.evaluation.sensitivity import measure
from lbq.evaluation.stream import OnProgress
from lbq.evaluation.windows import Windows, bundled_text
from lbq.formats.artifact import open_artifact
from lbq.formats.disk import hash_file
from lbq.formats.errors import DataError, UsageError
from lbq.formats.quality import Estimate, FrontierPoint, Quality, Sensitivity, Text
from lbq.formats.report import report_of
from lbq.quantizer.calibration import calibrate
from lbq.quantizer.original import Original, open_original
from lbq.quantizer.prepare import Prepared
from lbq.quantizer.source import CONFIG
from lbq.runtime.devices import Device, device_errors

CONTEXT = 256  # tokens of a window
TOKENS = 1024
SEED = 42  # of the samples that are taken of a calibration text


@dataclass(frozen=True)
class Study:
    """Divergences of all free units at all their bits, on ``text``; and the choice that was made, if one was."""

    freedom: Freedom
    text: Text
    sensitivity: tuple[Sensitivity, ...]
    chosen: Chosen | None = None

    def choose(self, target_bpw: float) -> Study:
        """Choose bits. Raises UsageError for a size that cannot be had."""
        return replace(self, chosen=self.freedom.choose(self.sensitivity, target_bpw))

    @property
    def prepared(self) -> Prepared:
        """The conversion, with the bits that were chosen."""
        return self.chosen.prepared if self.chosen else self.freedom.prepared

    def added_to(self, quality: Quality) -> Quality:
        """A report of the whole artifact with what the units do alone, and the frontier that follows."""
        kl = Estimate(quality.scores.kl.mean, quality.scores.kl.standard_error)
        return msgspec.structs.replace(
            quality, sensitivity_text=self.text, sensitivity=self.sensitivity, frontier=self._frontier(kl)
        )

    def _frontier(self, kl: Estimate) -> tuple[FrontierPoint, ...]:
        if self.chosen is None:
            return self.freedom.frontier(self.sensitivity)
        points, own = self.chosen.frontier, self.chosen.point
        return tuple(msgspec.structs.replace(p, measured_kl=kl) if p == own else p for p in points)


class UnitMeasurement:
    """Measures a :class:`Study`. Text and tokenizer are looked at when this is made."""

    def __init__(self, freedom: Freedom, device: Device, calibration: str | None = None) -> None:
        """``device`` should be exact; ``calibration``: a text, as for :func:`lbq.quantizer.calibration.calibrate`.

        Raises DataError for a source without a tokenizer, and what reading the text raises.
        """
        self._freedom, self._device = freedom, device
        with open_original(freedom.prepared.source) as original:
            self._windows, self._text = _samples(original, calibration) if calibration else _bundled(original)

    def measure(self, on_progress: OnProgress | None = None) -> Study:
        """Raises DataError for broken weights, DeviceError."""
        with device_errors():
            found = measure(self._freedom, self._windows, self._device, on_progress=on_progress)
        return Study(self._freedom, self._text, found)


def _bundled(original: Original) -> tuple[Windows, Text]:
    """The second half of the text that ships with lbq: what reports read by default is the beginning of the first."""
    file = bundled_text()
    late = replace(file, text=file.text[len(file.text) // 2 :])
    windows = windows_of(late, (original,), min(CONTEXT, original.spec.context), TOKENS)
    return windows, text_of(late, windows, late.path.name)


def _samples(original: Original, calibration: str) -> tuple[Windows, Text]:
    """Stretches from all over a text; fewer than TOKENS tokens of a short one."""
    context = min(CONTEXT, original.spec.context)
    found = calibrate(calibration, original.folder, max(1, TOKENS // context), context, SEED)
    windows = Windows([], found.tokens.flatten().tolist(), context)
    text = Text(found.name, found.sha256, len(windows.ids), context, len(windows), windows.positions)
    return windows, text


def saved(freedom: Freedom, artifact: Path) -> Study:
    """The study in the report of an artifact of the same source, whatever bits that one has.

    Raises UsageError where its report has none or not of these units and groups, DataError where it was made from
    another source, and what opening an artifact raises.
    """
    with open_artifact(artifact) as opened:
        manifest = opened.manifest
    quality, files = report_of(artifact, manifest).quality, manifest.source.files
    if quality is None or quality.sensitivity_text is None:
        raise UsageError(f"{artifact}: no sensitivities in its report; one made with --report full has them")
    checkpoint = freedom.prepared.checkpoint
    for name in (CONFIG, *checkpoint.files):
        if files.get(name) != hash_file(checkpoint.folder / name):
            raise DataError(f"{artifact}: made from another source: {checkpoint.folder / name} is not what it read")
    found = {(s.modules, s.bits, s.group): s for s in quality.sensitivity}
    wanted = []
    for unit, bits in ((u, bits) for u in freedom.units for bits in u.steps):
        modules, group = unit.modules, unit.group(bits)
        known = found.get((modules, bits, group))
        if known is None:
            size = f"groups of {group}" if group else "a scale a row"
            raise UsageError(f"{artifact}: its report does not have {modules[0]} at {bits} bits, {size}; measure again")
        wanted.append(msgspec.structs.replace(known, nbytes=unit.nbytes(bits)))  # stored for other readers, perhaps
    return Study(freedom, quality.sensitivity_text, tuple(wanted))
