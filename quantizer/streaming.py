"""Converting while downloading: shards of a source on the Hub are fetched, converted and dropped one by one.

Beside the target ``NAME`` stands, until the artifact is whole, the folder ``.NAME.stream``: the source's shards that
are in use in ``source``, the artifact's unfinished files, and ``stream.json``, which says what they are of and what is
done. It is written anew when all that a shard of the source gives is on the disk; only then is that shard dropped. A
conversion that was cut goes on after the last such shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lbq import __version__
from lbq.formats import json_file
from lbq.formats.disk import FileEntry, storage_errors, write_file
from lbq.formats.errors import DataError
from lbq.formats.safetensors_file import INDEX, Checkpoint
from lbq.formats.spec import Part
from lbq.formats.staging import StagedFolder
from lbq.hub.snapshot import Snapshot
from lbq.quantizer.fetching import Fetcher, OnFetch
from lbq.quantizer.measure import Measured
from lbq.quantizer.methods import Rounded, device_name
from lbq.quantizer.plan import Keep, Plan, Quantize
from lbq.quantizer.remote import RemoteShard
from lbq.quantizer.shards import Shards
from lbq.quantizer.work_folder import Layers, WorkFolder, layer_differences, tool_differences
from lbq.quantizer.writing import OnProgress, Written, write_step

SOURCE = "source"
VERSION = 1
AHEAD = 2  # shards of the source that are here at a time


class Header(Part, frozen=True):
    """All that what is done depends on."""

    stream_format: int
    tools: dict[str, str]
    source: str
    revision: str
    device: str
    max_shard_bytes: int
    layers: Layers
    dense: tuple[str, ...]


class Journal(Part, frozen=True):
    """What is done: files of the source that were used up, layers that were measured, files that are whole."""

    header: Header
    sources: dict[str, FileEntry]
    modules: dict[str, Measured]
    files: dict[str, FileEntry]


class StreamWork(WorkFolder):
    """The files of a work folder."""

    SUFFIX = "stream"
    HEAD = "stream.json"
    OTHERS = re.compile(rf"{SOURCE}|{re.escape(INDEX)}|model(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors")
    LASTING = "*.safetensors*"

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        self.source = self.folder / SOURCE

    def open(self, header: Header, *, restart: bool) -> Journal:
        """Make the folder, or go on in one that was made for the same ``header``; ``restart`` drops what is there.

        Raises UsageError that says what differs, and what :meth:`head` raises.
        """
        found = self.head(Journal, restart=restart)
        if found is not None and (differences := list(_differences(found.header, header))):
            raise self.refusal(differences)
        if found is not None and not all(self.path(name).exists() for name in found.files):  # see hand_over
            self.remove()
            found = None
        journal = found or Journal(header, {}, {}, {})
        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.source.mkdir(exist_ok=True)
            for name in os.listdir(self.folder):  # one that was whole before the journal said so goes on being written
                if name.endswith(".safetensors") and name not in journal.files:
                    os.rename(self.path(name), self.path(f"{name}.part"))
            for name in journal.sources:  # used up, and not dropped before the end
                (self.source / name).unlink(missing_ok=True)
        if found is None:
            self.write(journal)
        return journal

    def path(self, name: str) -> Path:
        """Where a file of the folder is, or will be."""
        return self.folder / name

    def add_file(self, name: str, content: bytes) -> FileEntry:
        """Write a small file."""
        return write_file(self.path(name), content)

    def write(self, journal: Journal) -> None:
        """Keep what is done."""
        self.add_file(self.HEAD, json_file.encode(journal))
        self.sync()

    def hand_over(self, names: Iterable[str], stage: StagedFolder) -> None:
        """Let the artifact's files stand in the staged folder too: links, so that a kill before its commit loses
        nothing. Where the file system has none they are moved, and such a kill costs the work."""
        for name in names:
            with storage_errors(stage.path(name)):
                try:
                    os.link(self.path(name), stage.path(name))
                except OSError:
                    os.rename(self.path(name), stage.path(name))


def stream(
    source: Snapshot,
    checkpoint: Checkpoint,
    plan: Plan,
    stage: StagedFolder,
    device: torch.device,
    max_shard_bytes: int,
    *,
    restart: bool,
    on_progress: OnProgress,
    on_fetch: OnFetch,
) -> Written:
    """Convert by round to nearest; the staged folder has the artifact's tensors afterwards.

    The caller holds the lock of the stage's target.

    Raises RemoteError for the Hub, StorageError, DataError, and what :meth:`StreamWork.open` raises.
    """
    work = StreamWork(stage.target)
    journal = work.open(_header(source, plan, device, max_shard_bytes), restart=restart)
    by_file = _by_file(source, plan, checkpoint)
    done = [step for name in journal.sources for step in by_file.get(name, ())]
    for step in done:
        on_progress(_name(step), checkpoint.info(step.source).nbytes)
    written = frozenset(output.name for step in done for output in step.outputs())
    todo = [checkpoint.files[name] for name in by_file if name not in journal.sources]
    weights = Rounded(checkpoint, device)
    shards = Shards(work, plan.outputs(), max_shard_bytes, written, journal.files)
    with _dropped_with_bad_data(work), shards, Fetcher(source, todo, work.source, on_fetch) as fetcher:
        for file in todo:
            fetched = fetcher.take()
            if isinstance(file, RemoteShard):
                file.attach(fetched.path)
            steps = by_file[file.path.name]
            found = [write_step(step, checkpoint, weights, shards, on_progress) for step in steps]
            if isinstance(file, RemoteShard):
                file.close()
            shards.sync()
            journal = Journal(
                journal.header,
                journal.sources | {file.path.name: fetched.entry},
                journal.modules | {measured.report.name: measured for measured in found if measured is not None},
                dict(shards.files),
            )
            work.write(journal)
            fetcher.drop(fetched)
        work.hand_over(shards.finish(), stage)
    hashes = _hashes(source, checkpoint, journal.sources)
    return Written(shards.files, journal.modules, work.remove, hashes)


def _header(source: Snapshot, plan: Plan, device: torch.device, max_shard_bytes: int) -> Header:
    steps = [step for step in plan.steps if isinstance(step, Quantize)]
    return Header(
        stream_format=VERSION,
        tools={"lbq": __version__, "torch": str(torch.__version__)},
        source=source.hub_id.name,
        revision=source.commit,
        device=device_name(device),
        max_shard_bytes=max_shard_bytes,
        layers={step.module: (step.entry.bits, step.group, step.entry.group) for step in steps},
        dense=tuple(plan.dense),
    )


def _differences(found: Header, header: Header) -> Iterator[str]:
    """What differs, in words."""
    for field in ("stream_format", "source", "revision", "device", "max_shard_bytes"):
        then, now = getattr(found, field), getattr(header, field)
        if then != now:
            yield f"{field.replace('_', ' ')} {then}, now {now}"
    yield from layer_differences(found.layers, header.layers)
    if found.dense != header.dense:
        yield "other tensors that stay BF16"
    yield from tool_differences(found.tools, header.tools)


def _by_file(source: Snapshot, plan: Plan, checkpoint: Checkpoint) -> dict[str, list[Quantize | Keep]]:
    """What each file of the source is needed for, files in the order in which the plan first needs them.

    A file that is not needed is there if nobody says what it holds: the manifest has a hash of every file.
    """
    steps: dict[str, list[Quantize | Keep]] = {}
    for step in plan.steps:
        steps.setdefault(checkpoint.file_of(step.source), []).append(step)
    unknown = [name for name in checkpoint.files if name not in steps and source.files[name].sha256 is None]
    return steps | {name: [] for name in unknown}


def _hashes(source: Snapshot, checkpoint: Checkpoint, read: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Of every file of the source, as it was read or as the Hub says."""
    names = sorted(checkpoint.files)
    return {name: read.get(name) or FileEntry(source.size(name), source.files[name].sha256 or "") for name in names}


def _name(step: Quantize | Keep) -> str:
    return step.module if isinstance(step, Quantize) else step.name


@contextmanager
def _dropped_with_bad_data(work: StreamWork) -> Iterator[None]:
    """Bad data stay bad: there is nothing to go on with."""
    try:
        yield
    except DataError:
        work.remove()
        raise
