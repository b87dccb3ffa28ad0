"""What every free unit of a conversion does alone, and bits chosen from it: ``--target-bpw`` and full reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from lbq.evaluation.mixed import Chosen, Freedom
from lbq.evaluation.models import text_of, windows_of
from lbq.evaluation.sensitivity import measure
from lbq.evaluation.stream import OnProgress
from lbq.evaluation.windows import Windows, bundled_text
from lbq.formats.artifact import open_artifact
from lbq.formats.disk import FileEntry, hash_file
from lbq.formats.errors import DataError, UsageError
from lbq.formats.quality import Estimate, FrontierPoint, Quality, Sensitivity, Text
from lbq.formats.report import report_of
from lbq.quantizer.calibration import calibrate
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


class Units(Protocol):
    """Where a :class:`Study` comes from; what is wrong with it is said when it is made, before weights are needed."""

    def study(self, freedom: Freedom, on_progress: OnProgress | None = None) -> Study:
        """Of ``freedom``, whose weights are here."""
        ...


class UnitMeasurement:
    """Measures units. Text and tokenizer are looked at when this is made."""

    def __init__(self, prepared: Prepared, device: Device, calibration: str | None = None) -> None:
        """``device`` should be exact; ``calibration``: a text, as for :func:`lbq.quantizer.calibration.calibrate`.

        Raises DataError for a source without a tokenizer, and what reading the text raises.
        """
        self._device = device
        self._windows, self._text = _samples(prepared, calibration) if calibration else _bundled(prepared)

    def study(self, freedom: Freedom, on_progress: OnProgress | None = None) -> Study:
        """Raises DataError for broken weights, DeviceError."""
        with device_errors():
            found = measure(freedom, self._windows, self._device, on_progress=on_progress)
        return Study(freedom, self._text, found)


def _bundled(prepared: Prepared) -> tuple[Windows, Text]:
    """The second half of the text that ships with lbq: what reports read by default is the beginning of the first."""
    file = bundled_text()
    late = replace(file, text=file.text[len(file.text) // 2 :])
    windows = windows_of(late, (prepared,), min(CONTEXT, prepared.spec.context), TOKENS)
    return windows, text_of(late, windows, late.path.name)


def _samples(prepared: Prepared, calibration: str) -> tuple[Windows, Text]:
    """Stretches from all over a text; fewer than TOKENS tokens of a short one."""
    context = min(CONTEXT, prepared.spec.context)
    found = calibrate(calibration, prepared.folder, max(1, TOKENS // context), context, SEED)
    windows = Windows(list(found.prefix), found.tokens[:, len(found.prefix) :].flatten().tolist(), context)
    return windows, Text(found.name, found.sha256, len(windows.ids), context, len(windows), windows.positions)


class SavedUnits:
    """The units in the report of an artifact of the same source, whatever bits that one has."""

    def __init__(self, freedom: Freedom, artifact: Path) -> None:
        """Raises UsageError where its report has none or not of these units and groups, DataError where it was made
        from another source, and what opening an artifact raises. Of files on the Hub the Hub's hashes count."""
        with open_artifact(artifact) as opened:
            manifest = opened.manifest
        quality = report_of(artifact, manifest).quality
        if quality is None or quality.sensitivity_text is None:
            raise UsageError(f"{artifact}: no sensitivities in its report; one made with --report full has them")
        self._artifact, self._text = artifact, quality.sensitivity_text
        self._found = {(s.modules, s.bits, s.group): s for s in quality.sensitivity}
        _check_source(freedom.prepared, artifact, manifest.source.files)
        self.study(freedom)

    def study(self, freedom: Freedom, on_progress: OnProgress | None = None) -> Study:
        """Raises UsageError where the report has not all units and groups of ``freedom``."""
        del on_progress
        wanted = []
        for unit, bits in ((u, bits) for u in freedom.units for bits in u.steps):
            modules, group = unit.modules, unit.group(bits)
            known = self._found.get((modules, bits, group))
            if known is None:
                size = f"groups of {group}" if group else "a scale a row"
                raise UsageError(
                    f"{self._artifact}: its report does not have {modules[0]} at {bits} bits, {size}; measure again"
                )
            wanted.append(msgspec.structs.replace(known, nbytes=unit.nbytes(bits)))  # stored for other readers, perhaps
        return Study(freedom, self._text, tuple(wanted))


def _check_source(prepared: Prepared, artifact: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise DataError unless these are the files that the artifact was made from."""
    remote = prepared.source.remote
    for name in (CONFIG, *prepared.checkpoint.files):
        path = prepared.folder / name
        said = None if remote is None else remote.files[name].sha256
        if said is None and path.is_file():  # small files on the Hub have no sha256 there
            said = hash_file(path).sha256
        if name not in files or said not in (None, files[name].sha256):
            raise DataError(f"{artifact}: made from another source: {path} is not what it read")
