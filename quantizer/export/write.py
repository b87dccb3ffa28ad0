"""``lbq export``: an artifact as a checkpoint of another tool, streamed layer by layer; all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats.artifact import DENSE_DTYPE, Artifact, open_artifact, packed_tensors
from lbq.formats.compressed_tensors import quantization_config
from lbq.formats.disk import SPARE_BYTES, FileEntry, require_space
from lbq.formats.errors import UsageError
from lbq.formats.manifest import MANIFEST, PAGE, REPORT, DenseTensor, Manifest
from lbq.formats.report import Report, report_of
from lbq.formats.safetensors_file import INDEX
from lbq.formats.safetensors_writer import TensorPlan
from lbq.formats.staging import StagedFolder, check_target
from lbq.quantizer.export.gguf import gguf_layers, write_gguf
from lbq.quantizer.export.layouts import AutoRound, Awq, Gptq, Layout
from lbq.quantizer.export.plan import FITS, Layers, for_layout, for_reader
from lbq.quantizer.request import SHARD_BYTES
from lbq.quantizer.shards import Shards

LAYOUTS: Mapping[str, Layout] = {"gptq": Gptq(), "awq": Awq(), "auto-round": AutoRound()}
GGUF = "gguf"
TARGETS = (*FITS, *LAYOUTS, GGUF)

OnProgress = Callable[[str, int], None]  # name of the layer or tensor, bytes of it that were written


@dataclass(frozen=True)
class Export:
    """An export that has been decided and not begun."""

    artifact: Artifact
    to: str
    layers: Layers

    @property
    def steps(self) -> tuple[tuple[str, tuple[TensorPlan, ...]], ...]:
        """Layers and 16-bit tensors by name, and the tensors of each that are written, in the artifact's order."""
        layout = LAYOUTS.get(self.to)
        store = packed_tensors if layout is None else layout.tensors
        entries, dense = self.layers.entries, self.artifact.manifest.dense
        steps: list[tuple[str, tuple[TensorPlan, ...]]] = []
        steps += [(name, store(name, entry)) for name, entry in entries.items()]
        steps += [(name, (TensorPlan(name, DENSE_DTYPE, tensor.shape),)) for name, tensor in dense.items()]
        if whole := self.layers.whole:
            entry = self.artifact.manifest.quantized[whole]
            steps.append((whole, (TensorPlan(f"{whole}.weight", DENSE_DTYPE, (entry.n, entry.k)),)))
        return tuple(steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, planned in self.steps for tensor in planned)

    @property
    def default_name(self) -> str:
        """``NAME-gptq``"""
        return f"{self.artifact.folder.resolve().name}-{self.to}"


@dataclass(frozen=True)
class Exported:
    """What stands in a folder now."""

    path: Path
    to: str
    bytes: int
    notes: tuple[str, ...]


def export(
    artifact: Path | str,
    to: str,
    out: Path | str | None = None,
    *,
    ranks: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Write the artifact in the folder ``artifact`` for another tool, one of ``TARGETS``, by default to ``./NAME-TO``.

    ``ranks`` is the number of GPUs that vLLM or SGLang will share layers between. Codes and values stay what they are
    but for the result's ``notes``, which ``strict`` refuses. Raises an LbqError of any kind; nothing stands under
    ``out`` then.
    """
    with open_artifact(artifact) as opened:
        prepared = prepare_export(opened, to, ranks=ranks, strict=strict)
        target = Path(out) if out else Path(prepared.default_name)
        return write_export(prepared, target, on_progress, overwrite=overwrite)


def prepare_export(artifact: Artifact, to: str, *, ranks: int = 1, strict: bool = False) -> Export:
    """Decide; reads scales at most. Raises UsageError for what the tool cannot read, and under ``strict`` for anything
    that would be a note."""
    if to not in TARGETS:
        raise UsageError(f"--to {to}: {', '.join(TARGETS)} are known")
    if ranks != 1 and to not in FITS:
        raise UsageError(f"--tensor-parallel is for {' and '.join(FITS)}")
    if to == GGUF:
        layers = gguf_layers(artifact)
    else:
        layers = for_layout(artifact, LAYOUTS[to]) if to in LAYOUTS else for_reader(artifact, to, ranks)
    if strict and layers.notes:
        raise UsageError(f"refused under --strict: {layers.notes[0]}")
    return Export(artifact, to, layers)


def write_export(
    prepared: Export, out: Path, on_progress: OnProgress | None = None, *, overwrite: bool = False
) -> Exported:
    """Write into the folder ``out``, which appears whole or not at all, with ``overwrite`` in the place of an artifact.
    Raises what :class:`StagedFolder` raises, and StorageError for the disk."""
    artifact, progress = prepared.artifact, on_progress or _quiet
    ours = replaceable(artifact.folder, prepared.to)
    check_target(out, artifact.folder, overwrite=overwrite, ours=ours)
    require_space(out, prepared.nbytes + SPARE_BYTES)
    with StagedFolder(out, overwrite=overwrite, source=artifact.folder, ours=ours) as stage:
        if prepared.to == GGUF:
            write_gguf(artifact, prepared.layers.entries, stage, _gguf_name(artifact.folder), progress)
        else:
            files = _write_shards(prepared, stage, progress)
            files |= {name: stage.add_file(name, data) for name, data in _small_files(prepared)}
            if prepared.to in FITS:
                _seal(prepared, stage, files)
        nbytes = sum(path.stat().st_size for path in stage.folder.iterdir())
        stage.commit()
    return Exported(out, prepared.to, nbytes, prepared.layers.notes)


def replaceable(folder: Path, to: str) -> frozenset[str]:
    """Files that an earlier export of ``folder`` left, which has no manifest to say so: a GGUF of this very name."""
    return frozenset([_gguf_name(folder)]) if to == GGUF else frozenset()


def _gguf_name(folder: Path) -> str:
    return f"{folder.resolve().name}.gguf"


def _quiet(name: str, count: int) -> None:
    """Progress that nobody watches."""
    del name, count


def _write_shards(prepared: Export, stage: StagedFolder, on_progress: OnProgress) -> dict[str, FileEntry]:
    artifact, layers = prepared.artifact, prepared.layers
    steps = prepared.steps
    with Shards(stage, (tensor for _, planned in steps for tensor in planned), SHARD_BYTES) as shards:
        for name, planned in steps:
            for tensor, content in zip(planned, _content(prepared, name), strict=True):
                shards.write(tensor.name, content)
                on_progress(name, tensor.nbytes)
            if name in layers.entries or name == layers.whole:
                artifact.release(name)
            else:
                artifact.release_dense(name)
        return shards.finish()


def _content(prepared: Export, name: str) -> tuple[torch.Tensor, ...]:
    artifact, layers = prepared.artifact, prepared.layers
    if name == layers.whole:
        return (artifact.packed(name).dequantize().to(DENSE_DTYPE),)
    entry = layers.entries.get(name)
    if entry is None:
        return (artifact.dense(name),)
    packed = artifact.packed(name).regrouped(entry.group)
    layout = LAYOUTS.get(prepared.to)
    if layout is not None:
        return layout.store(packed, packed.scales.to(torch.float16))
    return packed.words, packed.scales, torch.tensor([entry.n, entry.k], dtype=torch.int64)


def _small_files(prepared: Export) -> Iterator[tuple[str, bytes]]:
    """Everything that travels with the weights, and the config for its reader."""
    artifact = prepared.artifact
    ours = {INDEX, MANIFEST, REPORT, PAGE}
    for name in artifact.manifest.files:
        if name not in ours and not name.endswith(".safetensors"):
            data = json_file.read_bytes(artifact.folder / name)
            yield name, _config(prepared, data) if name == "config.json" else data


def _config(prepared: Export, data: bytes) -> bytes:
    artifact, entries = prepared.artifact, prepared.layers.entries
    dense = [p.name for p in artifact.spec.projections() if p.name not in entries]
    layout = LAYOUTS.get(prepared.to)
    if layout is None:
        settings = quantization_config({name: entry.scheme for name, entry in entries.items()}, dense)
    else:
        settings = layout.config(entries, dense)
    config = json_file.decode(data, dict[str, object], artifact.folder / "config.json")
    return json_file.encode({**config, "quantization_config": settings})


def _seal(prepared: Export, stage: StagedFolder, files: dict[str, FileEntry]) -> None:
    """Report and manifest: what vLLM and SGLang read is an artifact still."""
    artifact, layers = prepared.artifact, prepared.layers
    old = artifact.manifest
    report = _report(report_of(artifact.folder, old), layers)
    files[REPORT] = stage.add_file(REPORT, json_file.encode(report))
    readers = tuple(dict.fromkeys((*old.method.readers, prepared.to)))
    dense = dict(old.dense)
    if layers.whole:
        entry = old.quantized[layers.whole]
        dense[f"{layers.whole}.weight"] = DenseTensor((entry.n, entry.k))
    sizes = [packed_tensors(name, entry)[:2] for name, entry in layers.entries.items()]
    weights = sum(entry.n * entry.k for entry in layers.entries.values())
    bits = 8 * sum(tensor.nbytes for pair in sizes for tensor in pair) / weights
    summary = msgspec.structs.replace(old.summary, weights=weights, bits_per_weight=bits)
    if layers.whole:
        summary = msgspec.structs.replace(summary, kl=None, same_top1=None)
    manifest: Manifest = msgspec.structs.replace(
        old,
        quantized=layers.entries,
        dense=dense,
        method=msgspec.structs.replace(old.method, readers=readers),
        summary=summary,
        notes=(*old.notes, *layers.notes),
        files=dict(sorted(files.items())),
    )
    stage.add_file(MANIFEST, json_file.encode(manifest))


def _report(old: Report, layers: Layers) -> Report:
    """The same errors: the weights are the same. What was measured on a text goes where the head changes."""
    modules = tuple(
        msgspec.structs.replace(module, group=layers.entries[module.name].group)
        for module in old.modules
        if module.name in layers.entries
    )
    quality = None if layers.whole else old.quality
    return msgspec.structs.replace(old, modules=modules, notes=(*old.notes, *layers.notes), quality=quality)
