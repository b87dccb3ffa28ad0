"""The work folder of a conversion that takes hours: what is finished survives a kill at any moment.

Beside the target ``NAME`` it is ``.NAME.work``, protected by the lock of the target. ``work.json`` says what the work
is of; ``block-00007.safetensors`` holds a finished block's codes and scales; ``reference-00008`` and
``quantized-00008`` the hidden states that enter block 8 in the original and in the quantised model. Every file has its
name only once it is whole and on the disk.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lbq.formats import json_file
from lbq.formats.artifact import DENSE_DTYPE, packed_tensors
from lbq.formats.disk import FileEntry, storage_errors, sync_folder, write_file
from lbq.formats.errors import DataError, StorageError, UsageError
from lbq.formats.manifest import AutoRound
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import SafetensorsFile
from lbq.formats.safetensors_writer import ShardWriter, TensorPlan
from lbq.formats.spec import Part
from lbq.quantizer.plan import Quantize

HEADER = "work.json"
VERSION = 1
FILES = re.compile(r"(block|reference|quantized)-([0-9]{5})\.safetensors")


class Header(Part, frozen=True):
    """All that finished blocks depend on."""

    work_format: int
    tools: dict[str, str]
    source: dict[str, FileEntry]
    method: AutoRound
    layers: dict[str, tuple[int, int, int]]  # bits, group as searched, group as stored


class States(Sequence[torch.Tensor]):
    """The hidden states of all samples at one place of the model; a sequence of BF16 [1, tokens, hidden], mapped."""

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self._names = sorted(self._file.tensors)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: Any) -> Any:
        return self._file.tensor(self._names[number])

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Float32 [up to size, tokens, hidden], in order."""
        for start in range(0, len(self), size):
            names = self._names[start : start + size]
            yield torch.cat([self._file.tensor(name) for name in names]).float()
            for name in names:
                self._file.release(name)


class Work:
    """The files of a work folder. Its user holds the target's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def of(target: Path) -> Work:
        """The work folder that belongs to ``target``, which may not exist."""
        return Work(target.with_name(f".{target.name}.work"))

    def open(self, header: Header, *, restart: bool) -> None:
        """Make the folder, or go on in one that was made for the same ``header``; ``restart`` drops what is there.

        Raises UsageError that says what differs, StorageError for a folder that is not lbq's or a disk that refuses,
        DataError for a header that cannot be read.
        """
        if os.path.lexists(self.folder):
            found = self._found(restart)
            if restart:
                self.remove()
            elif found is not None:
                self._check(found, header)
        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob("*.part"):
                part.unlink()
        if not (self.folder / HEADER).exists():
            write_file(self.folder / HEADER, json_file.encode(header))
            with storage_errors(self.folder):
                sync_folder(self.folder)
                sync_folder(self.folder.parent)

    def _found(self, restart: bool) -> Header | None:
        """The header of a folder that is there; None where there is none yet, or nobody asks."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise StorageError(f"{self.folder}: not a folder of lbq's; move it away")
        with storage_errors(self.folder):
            present = os.listdir(self.folder)
        foreign = [name for name in present if not FILES.fullmatch(name.removesuffix(".part")) and HEADER not in name]
        if foreign:
            raise StorageError(f"{self.folder}: holds {foreign[0]!r}, which lbq did not write; move it away")
        if restart or (HEADER not in present and not any(map(FILES.fullmatch, present))):
            return None
        try:
            return json_file.read(self.folder / HEADER, Header)
        except (DataError, StorageError) as error:
            raise DataError(f"{error}; --restart drops this work") from None

    def _check(self, found: Header, header: Header) -> None:
        differences = list(_differences(found, header))
        if differences:
            raise UsageError(
                f"{self.folder}: unfinished work of another conversion: {'; '.join(differences[:3])}; "
                "repeat that command to finish it, choose another output, or drop it with --restart"
            )

    def path(self, kind: str, number: int) -> Path:
        """Where ``kind`` (block, reference, quantized) of block ``number`` is, or will be."""
        return self.folder / f"{kind}-{number:05}.safetensors"

    def has(self, kind: str, number: int) -> bool:
        """Whether it is finished."""
        return self.path(kind, number).exists()

    def numbers(self, kind: str) -> list[int]:
        """The blocks whose ``kind`` is finished, in order."""
        found = (FILES.fullmatch(name) for name in os.listdir(self.folder))
        return sorted(int(match[2]) for match in found if match is not None and match[1] == kind)

    def write_states(self, kind: str, number: int, shape: tuple[int, ...], batches: Iterable[torch.Tensor]) -> None:
        """Write hidden states [samples, tokens, hidden] that come in batches; they are stored as BF16."""
        samples, length, hidden = shape
        plans = [TensorPlan(f"{sample:06}", DENSE_DTYPE, (1, length, hidden)) for sample in range(samples)]
        with ShardWriter(self.path(kind, number), plans) as writer:
            sample = 0
            for batch in batches:
                for row in batch.to(DENSE_DTYPE).split(1):
                    writer.write(plans[sample].name, row)
                    sample += 1
            writer.finish()
        self.sync()

    def states(self, kind: str, number: int) -> States:
        """Finished hidden states. Raises DataError for a broken file."""
        return States(self.path(kind, number))

    def drop(self, kind: str, number: int) -> None:
        """Remove a file that nobody needs any more."""
        with storage_errors(self.folder):
            self.path(kind, number).unlink(missing_ok=True)

    def write_block(self, number: int, steps: Iterable[Quantize], packed: dict[str, PackedWeight]) -> None:
        """Keep the codes and scales of a finished block."""
        plans = [plan for step in steps for plan in step.outputs()[:2]]
        with ShardWriter(self.path("block", number), plans) as writer:
            for module, weight in packed.items():
                writer.write(f"{module}.weight_packed", weight.words)
                writer.write(f"{module}.weight_scale", weight.scales)
            writer.finish()
        self.sync()

    def block(self, number: int, steps: Iterable[Quantize]) -> dict[str, PackedWeight]:
        """The codes and scales of a finished block, mapped. Raises DataError for a broken file."""
        file = SafetensorsFile(self.path("block", number))
        packed = {}
        for step in steps:
            words, scales, _ = (plan.name for plan in packed_tensors(step.module, step.entry))
            entry = step.entry
            packed[step.module] = PackedWeight(
                file.tensor(words), file.tensor(scales), entry.bits, entry.group, entry.k
            )
        return packed

    def sync(self) -> None:
        """Make names durable."""
        with storage_errors(self.folder):
            sync_folder(self.folder)

    def nbytes(self) -> int:
        """Bytes of finished files."""
        total = 0
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # who holds the lock may be at work
                total += path.stat().st_size
        return total

    def remove(self) -> None:
        """Remove the folder."""
        with storage_errors(self.folder):
            shutil.rmtree(self.folder)


def _differences(found: Header, header: Header) -> Iterator[str]:
    """What differs, in words, the most telling first."""
    then, now = found.method, header.method
    if found.work_format != header.work_format:
        yield f"work of format {found.work_format}, this lbq has {header.work_format}"
    for name in sorted(found.source.keys() | header.source.keys()):
        if found.source.get(name) != header.source.get(name):
            yield f"the source's {name} has changed"
    if then.calibration is not None and now.calibration is not None:
        for field in ("name", "sha256", "samples", "tokens", "tokens_sha256"):
            was, is_ = getattr(then.calibration, field), getattr(now.calibration, field)
            if was != is_:
                what = {"tokens": "tokens a sample", "sha256": "text (sha256)", "tokens_sha256": "tokens (sha256)"}
                yield f"calibration {what.get(field, field)} {_short(was)}, now {_short(is_)}"
    for field in ("iterations", "batch", "seed", "device", "products"):
        if getattr(then, field) != getattr(now, field):
            yield f"{field} {getattr(then, field)}, now {getattr(now, field)}"
    for name in sorted(found.layers.keys() | header.layers.keys()):
        if found.layers.get(name) != header.layers.get(name):
            yield f"{name} {_scheme(found.layers.get(name))}, now {_scheme(header.layers.get(name))}"
            break
    for tool in sorted(found.tools.keys() | header.tools.keys()):
        if found.tools.get(tool) != header.tools.get(tool):
            yield f"{tool} {found.tools.get(tool)}, now {header.tools.get(tool)}"


def _scheme(layer: tuple[int, int, int] | None) -> str:
    return "BF16" if layer is None else f"INT{layer[0]} in groups of {layer[2]}"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
