"""The work folder of a conversion that takes hours: what is finished survives a kill at any moment.

Beside the target ``NAME`` it is ``.NAME.work``. ``work.json`` says what the work is of; ``block-00007.safetensors``
holds a finished block's codes and scales; ``reference-00008`` and ``quantized-00008`` the hidden states that enter
block 8 in the original and in the quantised model. Every file has its name only once it is whole and on the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lbq.formats import json_file
from lbq.formats.artifact import DENSE_DTYPE, packed_tensors
from lbq.formats.disk import FileEntry, storage_errors, sync_folder, write_file
from lbq.formats.manifest import AutoRound
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import SafetensorsFile
from lbq.formats.safetensors_writer import ShardWriter, TensorPlan
from lbq.formats.spec import Part
from lbq.quantizer.plan import Quantize
from lbq.quantizer.work_folder import Layers, WorkFolder, layer_differences, tool_differences

VERSION = 2
FILES = re.compile(r"(block|reference|quantized)-([0-9]{5})\.safetensors")


class Header(Part, frozen=True):
    """All that finished blocks depend on."""

    work_format: int
    tools: dict[str, str]
    source: dict[str, FileEntry]
    method: AutoRound
    layers: Layers
    device: str = ""  # by its name: two kinds of GPU do not add up alike


class States(Sequence[torch.Tensor]):
    """The hidden states of all samples at one place of the model; a sequence of BF16 [1, tokens, hidden], read from the
    file each time: none of its pages stay in memory."""

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self._names = sorted(self._file.tensors)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: Any) -> Any:
        name = self._names[number]
        sample = self._file.tensor(name).clone()
        self._file.release(name)
        return sample

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Float32 [up to size, tokens, hidden], in order."""
        for start in range(0, len(self), size):
            names = self._names[start : start + size]
            yield torch.cat([self._file.tensor(name) for name in names]).float()
            for name in names:
                self._file.release(name)


class Work(WorkFolder):
    """The files of a work folder."""

    SUFFIX = "work"
    HEAD = "work.json"
    OTHERS = FILES
    LASTING = "*.safetensors"

    def open(self, header: Header, *, restart: bool) -> None:
        """Make the folder, or go on in one that was made for the same ``header``; ``restart`` drops what is there.

        Raises UsageError that says what differs, and what :meth:`head` raises.
        """
        found = self.head(Header, restart=restart)
        if found is not None and (differences := list(_differences(found, header))):
            raise self.refusal(differences)
        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob("*.part"):
                part.unlink()
        if found is None:
            write_file(self.folder / self.HEAD, json_file.encode(header))
            self.sync()
            with storage_errors(self.folder):
                sync_folder(self.folder.parent)

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
    if found.device != header.device:
        yield f"device {found.device}, now {header.device}"
    for field in ("iterations", "batch", "seed", "products"):
        if getattr(then, field) != getattr(now, field):
            yield f"{field} {getattr(then, field)}, now {getattr(now, field)}"
    yield from layer_differences(found.layers, header.layers)
    yield from tool_differences(found.tools, header.tools)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
