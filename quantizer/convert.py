"""A BF16 checkpoint becomes an artifact, streamed tensor by tensor: memory is a few times the largest tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats import manifest as manifests
from lbq.formats import report as reports
from lbq.formats.compressed_tensors import quantization_config
from lbq.formats.disk import SPARE_BYTES, check_plain_name, require_space
from lbq.formats.errors import DeviceError, RemoteError, StorageError, UsageError
from lbq.formats.manifest import MANIFEST, PAGE, REPORT, Manifest
from lbq.formats.quality import Quality
from lbq.formats.report import Report
from lbq.formats.safetensors_file import INDEX
from lbq.formats.staging import StagedFolder, check_idle, check_target
from lbq.hub.client import OnNote, quiet
from lbq.quantizer import methods, streaming
from lbq.quantizer.autoround.run import OnProgress as OnTuned
from lbq.quantizer.autoround.work import Work
from lbq.quantizer.fetching import OnFetch
from lbq.quantizer.methods import Weights
from lbq.quantizer.prepare import Prepared
from lbq.quantizer.shards import Shards
from lbq.quantizer.source import Hasher
from lbq.quantizer.streaming import AHEAD, StreamWork
from lbq.quantizer.work_folder import KEPT, WorkFolder
from lbq.quantizer.writing import OnProgress, Written, write_step

Measure = Callable[[Path], Quality]  # what a whole artifact's report gets, see write_artifact
MakePage = Callable[[Manifest, Report], bytes]  # the report to look at: lbq.page.render


def _nothing(*told: object) -> None:
    """Nobody listens."""
    del told


@dataclass(frozen=True)
class Conversion:
    """A finished artifact."""

    path: Path
    manifest: Manifest
    report: Report


def check_output(model: str | Path, out: Path, *, overwrite: bool) -> None:
    """Raise what :func:`write_artifact` would raise about ``out``, before anything of ``model`` is fetched."""
    check_target(out, Path(model) if Path(model).is_dir() else None, overwrite=overwrite)
    check_idle(out)


def unfinished(prepared: Prepared, out: Path) -> bool:
    """Whether an interrupted conversion into ``out`` has left work with which another call goes on."""
    work = _work(prepared, out)
    return work is not None and work.begun


def write_artifact(
    prepared: Prepared,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    measure: Measure | None = None,
    page: MakePage | None = None,
    restart: bool = False,
    on_progress: OnProgress | None = None,
    on_tuned: OnTuned | None = None,
    on_fetch: OnFetch | None = None,
    on_note: OnNote = quiet,
) -> Conversion:
    """Convert into the folder ``out``, which appears whole or not at all. A source whose weights are on the Hub is
    converted while it is downloaded: see :func:`placed`.

    What takes long keeps finished work beside ``out``, and a later call goes on there; ``restart`` drops it.
    ``measure`` is called once with a folder that is the artifact in all but its name, before it appears as ``out``;
    what it returns becomes part of the report, and what it raises leaves no artifact. ``page`` makes ``report.html``.
    ``on_note`` hears of unfinished work of other conversions, and of work that could not be removed at the end.

    ``device`` is ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``. Raises BusyError if somebody else converts
    into ``out``, StorageError for the disk, DataError for a weight that cannot be quantised, UsageError and DeviceError
    for the device.
    """
    source = prepared.source
    on_device = _find_device(device)
    assert measure is None or source.remote is None, "measuring reads the source again"
    check_target(out, source.folder, overwrite=overwrite)
    require_space(out, _space(prepared, out, restart=restart))
    _say_what_is_left(prepared, out, on_note)
    small = _small_files(prepared)
    sources = [source.folder / "config.json", *source.companions(), *_weight_files(prepared)]
    staged = StagedFolder(out, overwrite=overwrite, source=source.folder)
    with _saying_what_is_kept(prepared, out), staged as stage, Hasher(sources) as hasher:
        try:
            written = _write(
                prepared,
                stage,
                hasher,
                on_device,
                restart=restart,
                on_progress=on_progress or _nothing,
                on_tuned=on_tuned or _nothing,
                on_fetch=on_fetch or _nothing,
            )
        except torch.OutOfMemoryError:
            raise DeviceError(f"device {on_device}: out of memory; free some or convert with --device cpu") from None
        manifest, report = _describe(prepared, stage, hasher, on_device, written, small)
        if measure is not None:
            quality = measure(stage.folder)
            report = msgspec.structs.replace(report, quality=quality)
            summary = msgspec.structs.replace(
                manifest.summary, kl=quality.scores.kl.mean, same_top1=quality.scores.same_top1.mean
            )
            manifest = _seal(stage, msgspec.structs.replace(manifest, summary=summary), report)
        if page is not None:
            made = {PAGE: stage.add_file(PAGE, page(manifest, report))}
            manifest = _seal(stage, msgspec.structs.replace(manifest, files=manifest.files | made), report)
        stage.commit()
        _tidy(written, on_note)
    return Conversion(out, manifest, report)


def _describe(
    prepared: Prepared,
    stage: StagedFolder,
    hasher: Hasher,
    device: torch.device,
    written: Written,
    small: Mapping[str, bytes],
) -> tuple[Manifest, Report]:
    """Write all that goes with the tensors; the folder is an artifact then."""
    source, plan = prepared.source, prepared.plan
    files = dict(written.files)
    for name, data in small.items():
        files[name] = stage.add_file(name, data)
    modules = tuple(written.modules[module].report for module in plan.quantized)
    report = Report(reports.VERSION, modules, plan.notes)
    manifest = Manifest(
        lbq_format=manifests.VERSION,
        spec=plan.spec,
        quantized=plan.quantized,
        dense=plan.dense,
        method=prepared.given.method
        if prepared.given
        else methods.described(prepared.request, prepared.calibration, device),
        source=manifests.Source(
            source.name, source.revision, hasher.result() | dict(written.sources), source.license()
        ),
        tools=methods.tools(prepared.request),
        summary=written.summary(plan),
        notes=plan.notes,
        files=files,
    )
    return _seal(stage, manifest, report), report


def _seal(stage: StagedFolder, manifest: Manifest, report: Report) -> Manifest:
    """Write report and manifest, which make the other files of the folder an artifact."""
    files = manifest.files | {REPORT: stage.add_file(REPORT, json_file.encode(report))}
    manifest = msgspec.structs.replace(manifest, files=dict(sorted(files.items())))
    stage.add_file(MANIFEST, json_file.encode(manifest))
    return manifest


def _find_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name!r}: auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device cuda: torch {torch.__version__} finds no CUDA device; use cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _weight_files(prepared: Prepared) -> list[Path]:
    """Those that are here: what is streamed is hashed as it comes."""
    folder = prepared.source.folder
    if prepared.source.file is not None:
        return [prepared.source.file]
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    return index + [folder / name for name in sorted(prepared.checkpoint.files) if prepared.source.remote is None]


def _space(prepared: Prepared, out: Path, *, restart: bool) -> int:
    """Bytes that a conversion still has to write beside ``out``."""
    work = _work(prepared, out)
    kept = 0 if work is None or restart else work.nbytes()
    artifact = prepared.plan.nbytes + SPARE_BYTES
    if prepared.source.remote is not None:
        return max(0, artifact + AHEAD * prepared.largest_remote - kept)
    return artifact + max(0, prepared.tuning_sizes.disk - kept)


def _work(prepared: Prepared, out: Path) -> WorkFolder | None:
    """Where a conversion keeps what is finished; None: it begins anew each time."""
    target = Path(os.path.realpath(out))
    if prepared.source.remote is not None:
        return StreamWork(target)
    return Work(target) if prepared.request.tuning is not None else None


def _say_what_is_left(prepared: Prepared, out: Path, on_note: OnNote) -> None:
    """Name unfinished work of another kind: this conversion does not touch it, and nobody else will remember it."""
    own = _work(prepared, out)
    for other in (kind(Path(os.path.realpath(out))) for kind in (Work, StreamWork)):
        if other.exists and (own is None or other.folder != own.folder):
            on_note(
                f"{other.folder}: unfinished work of another conversion, {other.nbytes()} bytes, which this one leaves "
                "as it is; remove it unless you are going to finish that one"
            )


@contextmanager
def _saying_what_is_kept(prepared: Prepared, out: Path) -> Iterator[None]:
    """Errors that are not the data's leave what is finished, and say so."""
    try:
        yield
    except (RemoteError, StorageError, DeviceError) as error:
        if unfinished(prepared, out):
            raise type(error)(f"{error}; {KEPT}") from error
        raise


def _tidy(written: Written, on_note: OnNote) -> None:
    """The artifact stands, whatever becomes of what was needed for it."""
    try:
        written.finish()
    except StorageError as error:
        on_note(f"{error}; the artifact is whole, and what is left there is of no more use: remove it")


def _write(
    prepared: Prepared,
    stage: StagedFolder,
    hasher: Hasher,
    device: torch.device,
    *,
    restart: bool,
    on_progress: OnProgress,
    on_tuned: OnTuned,
    on_fetch: OnFetch,
) -> Written:
    """All safetensors files, by the way that the source and the method ask for."""
    plan, source, request = prepared.plan, prepared.source, prepared.request
    if source.remote is not None:
        return streaming.stream(
            source.remote,
            prepared.checkpoint,
            plan,
            stage,
            device,
            request.max_shard_bytes,
            restart=restart,
            on_progress=on_progress,
            on_fetch=on_fetch,
        )
    weights: Weights = methods.Rounded(prepared.checkpoint, device)
    if prepared.given is not None:
        weights = prepared.given.weights
    if request.tuning is not None:
        weights = methods.tuned(
            request,
            source.folder,
            plan,
            prepared.checkpoint,
            prepared.calibration,
            hasher.result(),
            stage.target,
            device,
            restart=restart,
            on_progress=on_tuned,
        )
    with Shards(stage, plan.outputs(), request.max_shard_bytes) as shards:
        found = [write_step(step, prepared.checkpoint, weights, shards, on_progress) for step in plan.steps]
        modules = {measured.report.name: measured for measured in found if measured is not None}
        return Written(shards.finish(), modules, weights.finish)


def _small_files(prepared: Prepared) -> dict[str, bytes]:
    """What travels with the weights. Raises DataError for a name or size that no artifact has."""
    files = {"config.json": _config(prepared)}
    for path in prepared.source.companions():
        files[check_plain_name(path.name, str(prepared.source.folder))] = json_file.read_bytes(path)
    return files


def _config(prepared: Prepared) -> bytes:
    """The source's config.json with what readers of compressed-tensors need.

    Keys that are private or that lbq does not know stay behind: one names the folder of whoever saved the model, others
    pick code that transformers loads from the Hub.
    """
    plan = prepared.plan
    path = prepared.source.folder / "config.json"
    config = {
        key: value
        for key, value in json_file.read(path, dict[str, object]).items()
        if not key.startswith("_") and key not in prepared.unknown_keys
    }
    config["tie_word_embeddings"] = plan.spec.tied
    for key in ("dtype", "torch_dtype"):  # transformers 5 and 4
        if key in config or key == "dtype":
            config[key] = "bfloat16"
    schemes = {name: entry.scheme for name, entry in plan.quantized.items()}
    config["quantization_config"] = quantization_config(schemes, plan.dense_linears)
    return json_file.encode(msgspec.to_builtins(config))
