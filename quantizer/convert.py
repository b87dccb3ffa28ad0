"""A BF16 checkpoint becomes an artifact, streamed tensor by tensor: memory is a few times the largest tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats import manifest as manifests
from lbq.formats import report as reports
from lbq.formats.compressed_tensors import quantization_config
from lbq.formats.disk import FileEntry, check_plain_name, require_space
from lbq.formats.errors import DeviceError, UsageError
from lbq.formats.manifest import MANIFEST, PAGE, REPORT, Manifest
from lbq.formats.packing import PackedWeight
from lbq.formats.quality import Quality
from lbq.formats.report import ModuleReport, Report
from lbq.formats.safetensors_file import INDEX, Checkpoint
from lbq.formats.spec import ModelSpec
from lbq.formats.staging import StagedFolder, check_target
from lbq.formats.tokenizer_file import TOKENIZER
from lbq.quantizer import methods, tensors
from lbq.quantizer.autoround.run import OnProgress as OnTuned
from lbq.quantizer.autoround.run import Progress as Tuned
from lbq.quantizer.autoround.run import Sizes, sizes
from lbq.quantizer.autoround.work import Work
from lbq.quantizer.calibration import Calibration
from lbq.quantizer.families import read_spec
from lbq.quantizer.measure import Meter, Totals
from lbq.quantizer.methods import Given, Weights
from lbq.quantizer.plan import Keep, Plan, Quantize, make_plan
from lbq.quantizer.remote import RemoteShard
from lbq.quantizer.request import Request
from lbq.quantizer.shards import Shards
from lbq.quantizer.source import Hasher, SourceFolder, check_tokenizer, fetch_weights, open_weights

SPARE_BYTES = 64 << 20  # small files and headers, on top of the tensors

REMOTE_PIECES = 4  # of a head on the Hub that are compared with the embedding

OnProgress = Callable[[str, int], None]  # name of the tensor, bytes of the source that were consumed
Measure = Callable[[Path], Quality]  # what a whole artifact's report gets, see write_artifact
MakePage = Callable[[Manifest, Report], bytes]  # the report to look at: lbq.page.render


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been decided and not begun."""

    source: SourceFolder
    request: Request
    checkpoint: Checkpoint
    plan: Plan
    source_spec: ModelSpec  # before what the plan changes in it
    unknown_keys: tuple[str, ...]  # of config.json
    first_notes: tuple[str, ...]  # those of the plan that do not come from the request
    head_differs: bool  # see make_plan
    calibration: Calibration | None  # None: the method reads no text, or this is a dry run
    given: Given | None = None  # codes that are there already

    @property
    def folder(self) -> Path:
        """The source's."""
        return self.source.folder

    @property
    def spec(self) -> ModelSpec:
        """Of the result."""
        return self.plan.spec

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(self.checkpoint.info(step.source).nbytes for step in self.plan.steps)

    @property
    def remote_bytes(self) -> int:
        """Bytes of files that are on the Hub and not here."""
        return sum(file.size for file in self.checkpoint.files.values() if isinstance(file, RemoteShard))

    @property
    def peak_bytes(self) -> int:
        """Estimated peak of resident memory beyond the interpreter's: the worst step's source, result and blocks."""
        worst = max(
            self.checkpoint.info(step.source).nbytes + sum(tensor.nbytes for tensor in step.outputs())
            for step in self.plan.steps
        )
        return max(worst + 8 * 4 * tensors.CPU_BLOCK, self.tuning_sizes.memory)

    @property
    def tuning_sizes(self) -> Sizes:
        """What the method needs while it works: nothing for round to nearest."""
        return Sizes(0, 0) if self.request.tuning is None else sizes(self.plan, self.request.tuning)

    def default_name(self, target_bpw: float | None = None) -> str:
        """``NAME-int4-g256``, ``NAME-3.5bpw-g256`` for a target, ``NAME-int4-g128-autoround``: what was asked for."""
        scheme = self.request.scheme
        bits = f"int{scheme.bits}" if target_bpw is None else f"{target_bpw:g}bpw"
        group = f"g{scheme.group}" if scheme.group else "row"
        method = "" if self.request.tuning is None else "-autoround"
        return f"{self.source.label}-{bits}-{group}{method}"


@dataclass(frozen=True)
class Conversion:
    """A finished artifact."""

    path: Path
    manifest: Manifest
    report: Report


def check_output(model: str | Path, out: Path, *, overwrite: bool) -> None:
    """Raise what :func:`write_artifact` would raise about ``out``, before anything of ``model`` is fetched."""
    check_target(out, Path(model) if Path(model).is_dir() else None, overwrite=overwrite)


def unfinished(out: Path) -> bool:
    """Whether an interrupted conversion into ``out`` has left work with which another call goes on."""
    return Work.of(Path(os.path.realpath(out))).folder.is_dir()


def prepare(source: SourceFolder, request: Request, *, dry_run: bool = False) -> Prepared:
    """Read config, headers, tokenizer and calibration text, and decide; no weights, unless a tied checkpoint saves a
    head too, of which a part is read where it is on the Hub. A ``dry_run`` reads no text.

    Raises DataError and UsageError, and what :func:`~lbq.quantizer.calibration.calibrate` raises, before any output
    exists.
    """
    adapted = read_spec(source.folder)
    check_tokenizer(source.folder, adapted.spec.vocab_size)
    checkpoint = open_weights(source)
    notes = []
    if adapted.unknown_keys:
        notes.append(f"config.json: unknown keys are ignored: {', '.join(adapted.unknown_keys)}")
    if not (source.folder / TOKENIZER).is_file():
        notes.append(f"no {TOKENIZER}: the artifact has no text until the tokenizer is saved in this form")
    calibration = methods.read_calibration(request, source.folder, adapted.spec.context, notes, dry_run=dry_run)
    differs = head_differs(adapted.spec, checkpoint, most=REMOTE_PIECES if source.remote else None)
    plan = make_plan(adapted.spec, checkpoint, request, notes, differs)
    spec, unknown = adapted.spec, adapted.unknown_keys
    return Prepared(source, request, checkpoint, plan, spec, unknown, tuple(notes), differs, calibration)


def replan(prepared: Prepared, request: Request) -> Prepared:
    """The same source for another request; nothing is read again. Raises DataError and UsageError."""
    p = prepared
    plan = make_plan(p.source_spec, p.checkpoint, request, p.first_notes, p.head_differs)
    return replace(prepared, request=request, plan=plan)


def fetched(prepared: Prepared) -> Prepared:
    """The same with all weights in the Hub's cache. Raises what fetching and :func:`prepare` raise."""
    if prepared.source.remote is None:
        return prepared
    source = fetch_weights(prepared.source)
    checkpoint = open_weights(source)
    if head_differs(prepared.source_spec, checkpoint) != prepared.head_differs:
        return prepare(source, prepared.request)
    return replace(prepared, source=source, checkpoint=checkpoint)


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
) -> Conversion:
    """Convert into the folder ``out``, which appears whole or not at all.

    A method that takes long keeps finished work beside ``out``, and a later call goes on there; ``restart`` drops it.
    ``measure`` is called once with a folder that is the artifact in all but its name, before it appears as ``out``;
    what it returns becomes part of the report, and what it raises leaves no artifact. ``page`` makes ``report.html``.

    ``device`` is ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``. Raises BusyError if somebody else converts
    into ``out``, StorageError for the disk, DataError for a weight that cannot be quantised, UsageError and DeviceError
    for the device.
    """
    source, plan = prepared.source, prepared.plan
    on_device = _find_device(device)
    check_target(out, source.folder, overwrite=overwrite)
    kept = 0 if restart else Work.of(Path(os.path.realpath(out))).nbytes()
    require_space(out, plan.nbytes + SPARE_BYTES + max(0, prepared.tuning_sizes.disk - kept))
    small = _small_files(prepared)
    sources = [source.folder / "config.json", *source.companions(), *_weight_files(prepared)]
    with StagedFolder(out, overwrite=overwrite, source=source.folder) as stage, Hasher(sources) as hasher:
        try:
            weights: Weights = methods.Rounded(prepared.checkpoint, on_device)
            if prepared.given is not None:
                weights = prepared.given.weights
            if prepared.request.tuning is not None:
                weights = methods.tuned(
                    prepared.request,
                    source.folder,
                    plan,
                    prepared.checkpoint,
                    prepared.calibration,
                    hasher.result(),
                    stage.target,
                    on_device,
                    restart=restart,
                    on_progress=on_tuned or _nothing,
                )
            files, modules, totals = _write_shards(prepared, stage, weights, on_progress or _quiet)
        except torch.OutOfMemoryError:
            raise DeviceError(f"device {on_device}: out of memory; free some or convert with --device cpu") from None
        report = Report(reports.VERSION, tuple(modules), plan.notes)
        for name, data in small.items():
            files[name] = stage.add_file(name, data)
        manifest = Manifest(
            lbq_format=manifests.VERSION,
            spec=plan.spec,
            quantized=plan.quantized,
            dense=plan.dense,
            method=prepared.given.method
            if prepared.given
            else methods.described(prepared.request, prepared.calibration, on_device),
            source=manifests.Source(source.name, source.revision, hasher.result(), source.license()),
            tools=methods.tools(prepared.request),
            summary=totals.summary(plan.bits_per_weight),
            notes=plan.notes,
            files=files,
        )
        manifest = _seal(stage, manifest, report)
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
        weights.finish()
    return Conversion(out, manifest, report)


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


def _quiet(name: str, count: int) -> None:
    """Progress that nobody watches."""
    del name, count


def _nothing(progress: Tuned) -> None:
    """Likewise."""
    del progress


def _weight_files(prepared: Prepared) -> list[Path]:
    folder = prepared.source.folder
    index = folder / INDEX
    return ([index] if index.is_file() else []) + [folder / name for name in sorted(prepared.checkpoint.files)]


def head_differs(spec: ModelSpec, checkpoint: Checkpoint, most: int | None = None) -> bool:
    """Whether a tied checkpoint saves a head that is not the embedding; transformers then loads them untied.

    ``most``: how many pieces, of CPU_BLOCK weights, are compared at most.
    """
    head, embedding = f"{spec.head.name}.weight", f"{spec.embedding}.weight"
    names = checkpoint.names()
    if not spec.tied or head not in names or embedding not in names:
        return False
    a, b = checkpoint.info(head), checkpoint.info(embedding)
    same = a.shape == b.shape and a.dtype == b.dtype
    starts = range(0, a.nbytes // a.dtype.itemsize, tensors.CPU_BLOCK)[:most] if same else ()
    pieces = ([checkpoint.piece(name, at, at + tensors.CPU_BLOCK) for name in (head, embedding)] for at in starts)
    same = same and all(torch.equal(x, y) for x, y in pieces)
    for name in (head, embedding):
        checkpoint.release(name)
    return not same


def _write_shards(
    prepared: Prepared, stage: StagedFolder, weights: Weights, on_progress: OnProgress
) -> tuple[dict[str, FileEntry], list[ModuleReport], Totals]:
    """All safetensors files, each written front to back while its tensors are made."""
    plan = prepared.plan
    modules: list[ModuleReport] = []
    totals = Totals()
    checkpoint = prepared.checkpoint
    with Shards(stage, plan.outputs(), prepared.request.max_shard_bytes) as shards:
        for step in plan.steps:
            if isinstance(step, Keep):
                shards.write(step.name, weights.dense(step))
                on_progress(step.name, checkpoint.info(step.source).nbytes)
            else:
                meter = Meter()
                packed = _quantized(prepared, step, weights, meter, on_progress)
                for output, tensor in zip(step.outputs(), packed, strict=True):
                    shards.write(output.name, tensor)
                modules.append(meter.report(step.module, step.entry))
                totals.include(meter, step.entry)
            checkpoint.release(step.source)
        return shards.finish(), modules, totals


def _quantized(
    prepared: Prepared, step: Quantize, weights: Weights, meter: Meter, on_progress: OnProgress
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales and shape of one linear layer; the meter sees every block of rows."""
    row_bytes = prepared.checkpoint.info(step.source).nbytes // step.entry.n

    def measure(block: torch.Tensor, packed: PackedWeight) -> None:
        meter.add(block, packed.dequantize())
        on_progress(step.module, packed.n * row_bytes)

    packed = weights.packed(step, measure)
    return packed.words, packed.scales, torch.tensor([step.entry.n, step.entry.k], dtype=torch.int64)


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
