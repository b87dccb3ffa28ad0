"""Conversions from beginning to end: decided and written by the quantizer, measured by the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lbq.evaluation.mixed import freedom
from lbq.evaluation.report import Kind, Measurement, ReportRequest
from lbq.evaluation.stream import OnProgress
from lbq.evaluation.study import SavedUnits, Study, UnitMeasurement, Units
from lbq.formats.errors import UsageError
from lbq.formats.quality import Quality
from lbq.hub.client import OnNote, quiet
from lbq.page import render
from lbq.quantizer.autoround.run import OnProgress as OnTuned
from lbq.quantizer.autoround.settings import make_tuning
from lbq.quantizer.convert import Conversion, check_output, write_artifact
from lbq.quantizer.fetching import OnFetch
from lbq.quantizer.prepare import Prepared, placed, prepare
from lbq.quantizer.request import SHARD_BYTES, Request, make_request
from lbq.quantizer.source import resolve
from lbq.quantizer.writing import OnProgress as OnTensor
from lbq.runtime.devices import device_errors

DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Order:
    """What is asked of a conversion. Raises UsageError for what does not go together."""

    request: Request
    report: ReportRequest
    target_bpw: float | None = None
    sensitivity: Path | None = None  # an artifact with a full report: units are not measured again
    calib: str | None = None  # the text that units are measured on, if not lbq's

    def __post_init__(self) -> None:
        kind = self.report.kind
        if self.target_bpw is not None and kind != "full":
            raise UsageError(f"--report {kind}: --target-bpw measures all that a full report has; leave --report out")
        if self.sensitivity is not None and kind != "full":
            raise UsageError("--sensitivity is for --target-bpw and --report full")

    @property
    def rereads(self) -> str | None:
        """What of it reads the source more than once, as its option; a source cannot be streamed then."""
        if self.request.tuning is not None:
            return "--method autoround"
        if self.target_bpw is not None:
            return "--target-bpw"
        return None if self.report.kind == "weights" else f"--report {self.report.kind}"


def make_order(
    *,
    bits: int | None = None,
    group: int | str | None = None,
    lm_head: int | None = None,
    keep: Sequence[str] = (),
    overrides: Sequence[str] = (),
    readers: Sequence[str] = (),
    target_bpw: float | None = None,
    sensitivity: Path | None = None,
    method: str = "rtn",
    iters: int | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    calib: str | None = None,
    report: Kind | None = None,
    text: Path | None = None,
    report_tokens: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    strict: bool = False,
) -> Order:
    """An order from plain values, as the command line and :func:`convert` take them. Raises UsageError."""
    if target_bpw is not None and bits is not None:
        raise UsageError("--bits and --target-bpw: give one of them")
    kind = report or ("weights" if target_bpw is None else "full")
    for_units = kind == "full" and sensitivity is None  # then a text for calibration has a use, whatever the method
    tuning = make_tuning(
        method,
        iters=iters,
        nsamples=nsamples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        calib=None if for_units and (method == "rtn" or iters == 0) else calib,
    )
    request = make_request(
        4 if bits is None else bits,
        group,
        lm_head=lm_head,
        keep=keep,
        overrides=overrides,
        readers=readers,
        max_shard_bytes=max_shard_bytes,
        strict=strict,
        tuning=tuning,
    )
    return Order(request, ReportRequest(kind, text, report_tokens), target_bpw, sensitivity, calib)


@dataclass(frozen=True)
class Job:
    """A conversion that has been decided and not begun; ``study`` is there once units have been measured."""

    order: Order
    prepared: Prepared
    target: Path
    device: DeviceName
    overwrite: bool
    restart: bool = False
    measurement: Measurement | None = None
    units: Units | None = None
    study: Study | None = None

    def studied(self, on_units: OnProgress | None = None, on_note: OnNote = quiet) -> Job:
        """The job with all that a full report has of single units, and the bits that were chosen from it; ``on_note``
        hears of what differs from the order with these bits. The same job where nobody asked for that.

        Raises UsageError for a size that cannot be had, DataError for broken weights, DeviceError.
        """
        if self.units is None:
            return self
        free, target_bpw = freedom(self.prepared), self.order.target_bpw
        if target_bpw is not None:
            free.check(target_bpw)
        study = self.units.study(free, on_units)
        if target_bpw is None:
            return replace(self, study=study)
        study = study.choose(target_bpw)
        for line in study.prepared.plan.notes:
            if line not in study.prepared.first_notes:
                on_note(line)
        return replace(self, prepared=study.prepared, study=study)

    def run(
        self,
        *,
        on_tuned: OnTuned | None = None,
        on_progress: OnTensor | None = None,
        on_fetch: OnFetch | None = None,
        on_measured: OnProgress | None = None,
        on_note: OnNote = quiet,
    ) -> Conversion:
        """Convert and measure; errors as :func:`convert`."""

        def measure(folder: Path) -> Quality:
            assert self.measurement is not None
            quality = self.measurement.measure(folder, on_measured)
            return quality if self.study is None else self.study.added_to(quality)

        with device_errors("free memory, or convert with --device cpu"):
            return write_artifact(
                self.prepared,
                self.target,
                overwrite=self.overwrite,
                device=self.device,
                measure=measure if self.measurement else None,
                page=render if self.measurement else None,
                restart=self.restart,
                on_progress=on_progress,
                on_tuned=on_tuned,
                on_fetch=on_fetch,
                on_note=on_note,
            )


def decide(
    model: str | Path,
    order: Order,
    out: Path | None = None,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    stream: bool | None = None,
    restart: bool = False,
    on_note: OnNote = quiet,
) -> Job:
    """Find the model and decide what becomes of it; ``on_note`` hears of what differs from the order.

    ``stream``: see :func:`lbq.quantizer.prepare.placed`; ``restart`` drops what an interrupted conversion into the same
    folder has finished. A ``dry_run`` looks at no output, device or text, and leaves weights on the Hub.

    Raises what is wrong with any of them, and with the model; weights are fetched when all else has been found good.
    """
    if stream and order.rereads:
        raise UsageError(f"--stream reads the source once, {order.rereads} more than once; leave one of them out")
    if out is not None and not dry_run:
        check_output(model, out, overwrite=overwrite)
    prepared = prepare(resolve(model, revision, on_note, weights=False), order.request, dry_run=dry_run)
    target = out or Path(prepared.default_name(order.target_bpw))
    known = _notes(prepared, order)
    for line in known:
        on_note(line)
    if dry_run:
        return Job(order, prepared, target, device, overwrite, units=_units(prepared, order, None))
    check_output(model, target, overwrite=overwrite)
    measurement = None if order.report.kind == "weights" else Measurement(order.report, prepared, device)
    if measurement is not None and measurement.device.note:
        on_note(measurement.device.note)
    units = _units(prepared, order, measurement)
    there = placed(prepared, target, stream=stream, restart=restart, rereads=order.rereads, on_note=on_note)
    for line in _notes(there, order):
        if line not in known:  # weights can say more than headers
            on_note(line)
    return Job(order, there, target, device, overwrite, restart, measurement, units)


def _notes(prepared: Prepared, order: Order) -> tuple[str, ...]:
    """What there is to say: with a target only what no choice of bits changes, see :meth:`Job.studied`."""
    return prepared.plan.notes if order.target_bpw is None else prepared.first_notes


def _units(prepared: Prepared, order: Order, measurement: Measurement | None) -> Units | None:
    """Where a full report's units come from; what is wrong with the target and with these is raised."""
    if order.report.kind != "full":
        return None
    free = freedom(prepared)
    if order.target_bpw is not None:
        free.check(order.target_bpw)
    if order.sensitivity is not None:
        return SavedUnits(free, order.sensitivity)
    return None if measurement is None else UnitMeasurement(prepared, measurement.device, order.calib)


def convert(
    model: str | Path,
    out: str | Path | None = None,
    *,
    bits: int | None = None,
    group: int | Literal["row"] | None = None,
    lm_head: int | None = None,
    keep: Sequence[str] = (),
    overrides: Sequence[str] = (),
    readers: Sequence[str] = (),
    target_bpw: float | None = None,
    sensitivity: str | Path | None = None,
    method: Literal["rtn", "autoround"] = "rtn",
    iters: int | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    calib: str | None = None,
    report: Kind | None = None,
    text: str | Path | None = None,
    report_tokens: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    revision: str | None = None,
    device: DeviceName = "auto",
    strict: bool = False,
    overwrite: bool = False,
    stream: bool | None = None,
    restart: bool = False,
    on_note: OnNote = quiet,
    on_units: OnProgress | None = None,
    on_tuned: OnTuned | None = None,
    on_progress: OnTensor | None = None,
    on_fetch: OnFetch | None = None,
    on_measured: OnProgress | None = None,
) -> Conversion:
    """Quantize ``model``, a folder or a Hub id, into the folder ``out`` (default: ``./NAME-int4-g128``).

    The arguments are those of ``lbq convert``. ``bits`` is 4 by default; ``group`` None is one scale a row at 8 bits
    and 128 below; ``overrides`` are ``PATTERN=BITS``. ``target_bpw`` instead of ``bits`` chooses those of each unit, by
    measurements or by those of the artifact ``sensitivity``. ``iters`` to ``calib`` are for ``method="autoround"``,
    and ``calib`` is also what units are measured on. ``report`` "kl" measures the artifact against its source on
    ``text`` before it appears, "full" its units too. With ``stream`` the files of a source on the Hub are fetched,
    converted and dropped one by one, None doing so where the cache has no room for them. ``restart`` drops what an
    interrupted conversion has left beside ``out``.

    What differs from the request is in the result's ``manifest.notes``, and ``on_note`` hears of it. Of progress hear,
    in this order: ``on_units`` (steps done, in all), ``on_tuned``, ``on_progress`` (name of a tensor, bytes that were
    read), with ``on_fetch`` between (name of a file that is waited for, bytes that are here, in all), and
    ``on_measured`` (steps done, in all).

    Raises an LbqError of any kind; nothing stands under ``out`` then.
    """
    order = make_order(
        bits=bits,
        group=group,
        lm_head=lm_head,
        keep=keep,
        overrides=overrides,
        readers=readers,
        target_bpw=target_bpw,
        sensitivity=None if sensitivity is None else Path(sensitivity),
        method=method,
        iters=iters,
        nsamples=nsamples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        calib=calib,
        report=report,
        text=None if text is None else Path(text),
        report_tokens=report_tokens,
        max_shard_bytes=max_shard_bytes,
        strict=strict,
    )
    target = None if out is None else Path(out)
    job = decide(
        model,
        order,
        target,
        revision=revision,
        device=device,
        overwrite=overwrite,
        stream=stream,
        restart=restart,
        on_note=on_note,
    )
    job = job.studied(on_units, on_note)
    return job.run(
        on_tuned=on_tuned, on_progress=on_progress, on_fetch=on_fetch, on_measured=on_measured, on_note=on_note
    )
