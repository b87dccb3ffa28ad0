"""``lbq import``: another tool's checkpoint becomes an artifact, weight by weight the same, or says why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch

from lbq.formats.artifact import DENSE_DTYPE
from lbq.formats.disk import readable
from lbq.formats.errors import StorageError, UsageError
from lbq.formats.manifest import MANIFEST, Import
from lbq.formats.safetensors_file import Checkpoint
from lbq.formats.scheme import Scheme
from lbq.formats.spec import ModelSpec
from lbq.formats.staging import check_target
from lbq.formats.tokenizer_file import TOKENIZER
from lbq.hub.client import OnNote, quiet
from lbq.quantizer.convert import Conversion, check_output, write_artifact
from lbq.quantizer.families import read_quantized
from lbq.quantizer.foreign.checkpoint import ForeignCheckpoint, open_foreign
from lbq.quantizer.foreign.images import Images, Wish
from lbq.quantizer.methods import Given
from lbq.quantizer.plan import Keep, Plan, Quantize, casts, layer_order
from lbq.quantizer.prepare import Prepared
from lbq.quantizer.request import SHARD_BYTES, Request, scheme
from lbq.quantizer.rtn import DEFAULT_RULES
from lbq.quantizer.source import SourceFolder, check_tokenizer, resolve
from lbq.quantizer.tensors import CPU_BLOCK
from lbq.quantizer.writing import OnProgress


@dataclass(frozen=True)
class ImportRequest:
    """Settings of an import; None is what the source has. Raises UsageError for what makes no sense."""

    bits: int | None = None
    group: int | str | None = None
    lm_head: int | None = None
    requantize: bool = False
    max_shard_bytes: int = SHARD_BYTES
    strict: bool = False

    def __post_init__(self) -> None:
        scheme(4 if self.bits is None else self.bits, self.group)
        Request(Scheme(4, None), self.lm_head, max_shard_bytes=self.max_shard_bytes)

    def wish(self, head: bool) -> Wish:
        """What a unit is to be stored as; ``group`` is not for a head of 8 bits."""
        if head and self.lm_head is not None:
            return Wish(self.lm_head, self.group if self.lm_head < 8 else None)
        return Wish(self.bits, self.group)


def import_checkpoint(
    model: str | Path,
    out: str | Path | None = None,
    *,
    requantize: bool = False,
    bits: int | None = None,
    group: int | Literal["row"] | None = None,
    lm_head: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    original: str | Path | None = None,
    revision: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    on_note: OnNote | None = None,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Make an artifact of a GPTQ, AWQ, AutoRound, compressed-tensors or MLX checkpoint, a folder or a Hub id; or of a
    GGUF file, whose ``original`` is the model that it was made of.

    The arguments are those of ``lbq import``; the default output is ``./NAME-lbq``. Without ``requantize`` every
    quantised weight is the source's. Raises an LbqError of any kind; nothing stands under ``out`` then.
    """
    request = ImportRequest(bits, group, lm_head, requantize, max_shard_bytes, strict)
    if out is not None:
        check_output(model, Path(out), overwrite=overwrite)
    say = on_note or quiet
    source = find_source(model, original, revision, say)
    target = Path(out) if out is not None else default_name(source)
    check_target(target, source.folder, overwrite=overwrite)
    with open_foreign_only(source) as foreign:
        prepared = prepare_import(source, foreign, request)
        for text in prepared.plan.notes:
            say(text)
        return write_artifact(prepared, target, overwrite=overwrite, device="cpu", on_progress=on_progress, on_note=say)


def find_source(
    model: str | Path, original: str | Path | None, revision: str | None, on_note: OnNote = quiet
) -> SourceFolder:
    """The checkpoint ``model``, or a GGUF file beside the config and the tokenizer of its ``original``, of which no
    weights are fetched; ``revision`` is that of the Hub id among them. Raises what :func:`resolve` does, UsageError,
    and StorageError for a file that is not there."""
    path = Path(model)
    if not (path.suffix == ".gguf" and path.is_file()):
        if original is not None and path.suffix == ".gguf" and not path.exists():
            raise StorageError(f"{model}: no such file")
        if original is not None:
            raise UsageError(f"--original is for GGUF files; {model} is none")
        return resolve(model, revision, on_note)
    if original is None:
        raise UsageError(
            f"{model}: a GGUF file has no config.json and no tokenizer.json; --original MODEL, a folder or a Hub id, "
            "says which model it was made of"
        )
    found = resolve(original, revision, on_note, weights=False)
    return SourceFolder(found.folder, readable(path.stem), file=path)


def default_name(source: SourceFolder) -> Path:
    """``./NAME-lbq``"""
    return Path(f"{source.label}-lbq")


def open_foreign_only(source: SourceFolder) -> ForeignCheckpoint:
    """Open what another tool quantised. Raises what :func:`open_foreign` does, and UsageError for what is no such
    checkpoint."""
    if source.file is None and (source.folder / MANIFEST).is_file():
        raise UsageError(f"{source.place}: an lbq artifact already; lbq run {source.place}")
    foreign = open_foreign(source)
    if foreign.tool is None:
        foreign.close()
        raise UsageError(f"{source.place}: not quantized; lbq convert {source.place} quantizes it")
    return foreign


def prepare_import(source: SourceFolder, foreign: ForeignCheckpoint, request: ImportRequest) -> Prepared:
    """Decide every tensor's fate; all codes are read once, to know that their images are exact.

    Raises UsageError for weights without an exact image unless they may be requantised, and under ``strict`` for
    anything that would be a note; DataError for values without a meaning.
    """
    adapted, _ = read_quantized(source.folder)
    check_tokenizer(source.folder, adapted.spec.vocab_size)
    notes = list(foreign.notes)
    if adapted.unknown_keys:
        notes.append(f"config.json: unknown keys are ignored: {', '.join(adapted.unknown_keys)}")
    if not (source.folder / TOKENIZER).is_file():
        notes.append(f"no {TOKENIZER}: the artifact has no text until the tokenizer is saved in this form")
    spec = foreign.spec
    images = Images(foreign, requantize=request.requantize)
    for unit in spec.units():
        head = unit == (spec.head,)
        if not head or request.lm_head in (4, 8) or (request.lm_head is None and spec.head.name in foreign.layers):
            images.choose(unit, request.wish(head))
    images.check(source.place)
    plan = _plan(spec, foreign, images, notes)
    if request.strict and plan.notes:
        raise UsageError(f"refused under --strict: {plan.notes[0]}")
    most = images.most_common()
    made = Request(most, request.lm_head, max_shard_bytes=request.max_shard_bytes, strict=request.strict)
    head_entry = images.entries.get(spec.head.name)
    method = Import(
        scale_rules={str(bits): DEFAULT_RULES[bits].value for bits in sorted(images.rounded_bits)},
        bits=most.bits,
        group=most.group,
        lm_head=head_entry.bits if head_entry else 16,
        origin=foreign.tool or "",
        requantized=images.requantized,
    )
    unknown = adapted.unknown_keys
    given = Given(images, method)
    return Prepared(source, made, foreign.checkpoint, plan, spec, unknown, tuple(notes), False, None, given)


def _plan(spec: ModelSpec, foreign: ForeignCheckpoint, images: Images, notes: Sequence[str]) -> Plan:
    """Steps in the order of the output, and everything there is to say."""
    head = spec.head.name

    def keep(name: str, *shape: int) -> Keep:
        return Keep(name, foreign.tensors(name.removesuffix(".weight"))[0] if name.endswith(".weight") else name, shape)

    kept = [keep(f"{spec.embedding}.weight", spec.vocab_size, spec.hidden_size)]
    kept += [keep(f"{name}.weight", width) for name, width in spec.norms()]
    steps: list[Quantize | Keep] = []
    for p in spec.projections():
        if p.name in images.entries:
            entry = images.entries[p.name]
            steps.append(Quantize(p.name, foreign.tensors(p.name)[0], entry.group, entry))
        elif not (spec.tied and p.name == head):
            kept.append(keep(f"{p.name}.weight", p.out_features, p.in_features))
        if p.bias:
            kept.append(keep(f"{p.name}.bias", p.out_features))
    whole = [step for step in kept if step.name.removesuffix(".weight") in foreign.layers]
    said = [f"{step.name} is dequantized and rounded to bfloat16" for step in whole]
    said += casts(foreign.checkpoint, [s for s in kept if s not in whole and _rounded(foreign.checkpoint, s)])
    tied = spec.tied and head not in images.entries
    ordered = sorted((*steps, *kept), key=layer_order)
    return Plan(msgspec.structs.replace(spec, tied=tied), tuple(ordered), (*notes, *images.notes, *said))


def _rounded(checkpoint: Checkpoint, step: Keep) -> bool:
    """Whether BF16 does not hold a tensor: other tools save BF16 models as F16, often without a loss."""
    tensor = checkpoint.tensor(step.source)
    pieces = tensor.flatten().split(CPU_BLOCK) if tensor.dtype != DENSE_DTYPE else ()
    return not all(torch.equal(piece, piece.to(DENSE_DTYPE).to(piece.dtype)) for piece in pieces)
