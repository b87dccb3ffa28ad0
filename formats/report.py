"""``report.json``: what quantisation did to every weight."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lbq.formats import json_file
from lbq.formats.errors import DataError
from lbq.formats.manifest import REPORT, Manifest
from lbq.formats.quality import Quality
from lbq.formats.spec import Bounded, Part

VERSION = 1


class ModuleReport(Part, frozen=True):
    """One linear layer, its weights against those of the source.

    ``cosine`` is ⟨W, Ŵ⟩ / (‖W‖ ‖Ŵ‖), ``relative_error`` ‖W − Ŵ‖ / ‖W‖, ``worst_row_error`` the largest relative error
    of a row and ``worst_row`` that row's number.
    """

    name: str
    n: int
    k: int
    bits: int
    group: int
    cosine: Bounded
    relative_error: Bounded
    worst_row_error: Bounded
    worst_row: int


class Report(Part, frozen=True):
    """The whole report; totals are in the manifest's summary."""

    report_format: int
    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]
    quality: Quality | None = None  # of a report that was measured on a text


class _Version(msgspec.Struct):
    report_format: int


def read_report(folder: Path) -> Report:
    """Read ``folder/report.json``.

    Raises DataError for a version this lbq does not know or a field that is wrong, StorageError where there is none.
    """
    path = folder / REPORT
    data = json_file.read_bytes(path)
    version = json_file.decode(data, _Version, path).report_format
    if version != VERSION:
        raise DataError(f"{path}: format version {version}; this lbq reads version {VERSION}: upgrade lbq")
    return json_file.decode(data, Report, path)


def report_of(folder: Path, manifest: Manifest) -> Report:
    """The report of the artifact in ``folder``, whose manifest is ``manifest``.

    Raises what :func:`read_report` does, and DataError where there is none or it is of other layers.
    """
    if REPORT not in manifest.files:
        raise DataError(f"{folder}: no {REPORT}; convert the artifact again")
    report = read_report(folder)
    if {module.name for module in report.modules} != manifest.quantized.keys():
        path = folder / REPORT
        raise DataError(f"{path}: its layers are not those of the manifest; fetch or convert the artifact again")
    return report
