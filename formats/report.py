"""``report.json``: what quantisation did to every weight."""

from __future__ import annotations

import msgspec

VERSION = 1


class ModuleReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear layer, its weights against those of the source.

    ``cosine`` is ⟨W, Ŵ⟩ / (‖W‖ ‖Ŵ‖), ``relative_error`` ‖W − Ŵ‖ / ‖W‖, ``worst_row_error`` the largest relative error
    of a row and ``worst_row`` that row's number.
    """

    name: str
    n: int
    k: int
    bits: int
    group: int
    cosine: float
    relative_error: float
    worst_row_error: float
    worst_row: int


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole report; totals are in the manifest's summary."""

    report_format: int
    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]
