"""What a conversion needs to know before it begins: the source by its headers, the plan, and where the weights are."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lbq.formats.disk import SPARE_BYTES, free_bytes, require_space
from lbq.formats.errors import StorageError, UsageError
from lbq.formats.safetensors_file import Checkpoint
from lbq.formats.spec import ModelSpec
from lbq.formats.tokenizer_file import TOKENIZER
from lbq.hub.client import OnNote, quiet
from lbq.quantizer import methods, tensors
from lbq.quantizer.autoround.run import Sizes, sizes
from lbq.quantizer.calibration import Calibration
from lbq.quantizer.families import read_spec
from lbq.quantizer.methods import Given
from lbq.quantizer.plan import Plan, make_plan
from lbq.quantizer.remote import RemoteShard
from lbq.quantizer.request import Request
from lbq.quantizer.source import SourceFolder, check_tokenizer, fetch_weights, open_weights

REMOTE_PIECES = 4  # of a head on the Hub that are compared with the embedding


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
    def largest_remote(self) -> int:
        """Bytes of the largest of them."""
        return max((file.size for file in self.checkpoint.files.values() if isinstance(file, RemoteShard)), default=0)

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
    differs = head_differs(adapted.spec, checkpoint)
    plan = make_plan(adapted.spec, checkpoint, request, notes, differs)
    spec, unknown = adapted.spec, adapted.unknown_keys
    return Prepared(source, request, checkpoint, plan, spec, unknown, tuple(notes), differs, calibration)


def replan(prepared: Prepared, request: Request) -> Prepared:
    """The same source for another request; nothing is read again. Raises DataError and UsageError."""
    p = prepared
    plan = make_plan(p.source_spec, p.checkpoint, request, p.first_notes, p.head_differs)
    return replace(prepared, request=request, plan=plan)


def placed(
    prepared: Prepared,
    out: Path,
    *,
    stream: bool | None = None,
    restart: bool = False,
    rereads: str | None = None,
    on_note: OnNote = quiet,
) -> Prepared:
    """The same with its weights where the conversion wants them: here, or on the Hub still, from where they are then
    streamed shard by shard. The latter with ``stream``, or by itself where the Hub's cache has no room for them.

    ``rereads`` names what reads the source more than once, so that it cannot be streamed: not with ``stream`` then.
    Raises UsageError for what does not go together, StorageError for a cache without room, and what fetching raises.
    """
    assert not (stream and rereads)
    remote = prepared.source.remote
    if restart and remote is None and prepared.request.tuning is None:
        raise UsageError("--restart has no effect: round to nearest keeps no work of a source that is here")
    if stream and remote is None:
        raise UsageError("--stream has no effect on a folder; give a Hub id")
    if remote is None:
        return prepared
    need = prepared.remote_bytes + (
        prepared.plan.nbytes + SPARE_BYTES if _same_disk(prepared.source.folder, out) else 0
    )
    free = free_bytes(prepared.source.folder)
    if stream is None and free < need:
        lack = f"no room for the source in the cache ({need} bytes needed, {free} free)"
        if rereads:
            raise StorageError(
                f"{prepared.source.folder}: {lack}, and {rereads} reads it more than once; "
                "make room, let HF_HUB_CACHE name a larger disk, or leave it out: files are then converted one by one"
            )
        on_note(f"{lack}: its files are fetched, converted and dropped one by one")
        stream = True
    if stream:
        return _confirmed(prepared)
    require_space(prepared.source.folder, need)
    return _fetched(prepared)


def _same_disk(one: Path, other: Path) -> bool:
    return os.stat(one).st_dev == os.stat(Path(os.path.realpath(other)).parent).st_dev


def _confirmed(prepared: Prepared) -> Prepared:
    """The same, once a head that is saved beside a tied embedding has been compared whole."""
    differs = head_differs(prepared.source_spec, prepared.checkpoint, thorough=True)
    return prepared if differs == prepared.head_differs else _decided(prepared, differs)


def _fetched(prepared: Prepared) -> Prepared:
    """The same with all weights in the Hub's cache. Raises what fetching raises."""
    if prepared.source.remote is None:
        return prepared
    source = fetch_weights(prepared.source)
    prepared = replace(prepared, source=source, checkpoint=open_weights(source))
    return _confirmed(prepared)


def _decided(prepared: Prepared, head_differs: bool) -> Prepared:
    p = prepared
    plan = make_plan(p.source_spec, p.checkpoint, p.request, p.first_notes, head_differs)
    return replace(prepared, plan=plan, head_differs=head_differs)


def head_differs(spec: ModelSpec, checkpoint: Checkpoint, *, thorough: bool = False) -> bool:
    """Whether a tied checkpoint saves a head that is not the embedding; transformers then loads them untied.

    Where they are on the Hub only their beginnings are compared, unless ``thorough``.
    """
    head, embedding = f"{spec.head.name}.weight", f"{spec.embedding}.weight"
    names = checkpoint.names()
    if not spec.tied or head not in names or embedding not in names:
        return False
    a, b = checkpoint.info(head), checkpoint.info(embedding)
    same = a.shape == b.shape and a.dtype == b.dtype
    remote = any(isinstance(file, RemoteShard) for file in checkpoint.files.values())
    most = REMOTE_PIECES if remote and not thorough else None
    starts = range(0, a.nbytes // a.dtype.itemsize, tensors.CPU_BLOCK)[:most] if same else ()
    pieces = ([checkpoint.piece(name, at, at + tensors.CPU_BLOCK) for name in (head, embedding)] for at in starts)
    same = same and all(torch.equal(x, y) for x, y in pieces)
    for name in (head, embedding):
        checkpoint.release(name)
    return not same
