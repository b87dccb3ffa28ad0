"""An artifact against its original: both decode the same windows of a text, a few hundred positions at a time.

Neither logits nor probabilities are stored: a block of both models' logits becomes a few numbers a position and is
dropped. Both models must fit in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from lbq.evaluation.scores import Scorer, summarize
from lbq.evaluation.windows import Windows, cut, read_text
from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.disk import readable
from lbq.formats.errors import DataError, UsageError
from lbq.formats.manifest import MANIFEST
from lbq.formats.quality import EVALUATION_VERSION, Evaluation, Text, Weights
from lbq.quantizer.original import Original, open_original
from lbq.quantizer.source import resolve
from lbq.runtime.binding import bind
from lbq.runtime.devices import Device, device_errors, find_device, set_threads
from lbq.runtime.text.tokenizer import Tokenizer

CONTEXT = 512
SHORTEST = 4
BLOCK = 256  # positions whose logits are held at a time

OnProgress = Callable[[int, int], None]  # tokens done, tokens in all
OnNote = Callable[[str], None]


class Side:
    """One of the two models on a device."""

    def __init__(self, name: str, weights: Artifact | Original, device: Device, context: int) -> None:
        self._name = name
        self._engine = device.engine(bind(weights, device).decoder, context)

    def begin(self, ids: Sequence[int]) -> None:
        """Forget everything, then take in ``ids``."""
        self._engine.truncate(0)
        self._engine.prefill(ids)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Take in ``ids``; the logits after each, float32 [T, V]. Raises DataError if they are not finite."""
        logits = self._engine.all_logits(ids)
        if not bool(logits.isfinite().all()):
            raise DataError(f"{self._name}: the logits are not finite; the weights are broken")
        return logits


def evaluate(
    artifact: Path | str,
    reference: Path | str,
    text: Path | str,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> Evaluation:
    """Compare ``artifact`` with ``reference`` (a checkpoint's folder, a Hub id or another artifact) on a text file.

    ``context`` is the length of a window, by default 512 or what the models were made for; ``max_tokens`` bounds the
    text. Both models run in the runtime's float32 mode, so that the weights alone differ. ``threads`` is torch's number
    of them, for the whole process. ``on_note`` hears of what differs from what one would expect, before the work; the
    result has it too.

    Raises UsageError for arguments, StorageError and DataError for files and for models that cannot be compared,
    RemoteError for the Hub, DeviceError for the device.
    """
    if threads is not None:
        set_threads(threads)
    if not str(reference):
        raise UsageError("no reference: give the original's folder or Hub id")
    if max_tokens is not None and not isinstance(max_tokens, int):
        raise UsageError(f"max_tokens {max_tokens!r}: a whole number is needed")
    where = find_device(device, exact=True)
    file = read_text(Path(text))
    with ExitStack() as stack:
        student = stack.enter_context(open_artifact(artifact))
        teacher = _open_reference(reference)
        stack.enter_context(teacher)
        notes = _notes(str(reference), teacher, where)
        if on_note is not None:
            for line in notes:
                on_note(line)
        context = _checked_context(context, student, teacher)
        windows = cut(file, (_tokenizer(student), _tokenizer(teacher)), context, max_tokens)
        with device_errors():
            scorer = _run(
                Side(str(reference), teacher, where, context),
                Side(str(artifact), student, where, context),
                windows,
                on_progress or _quiet,
            )
        summary = student.manifest.summary
        return Evaluation(
            eval_format=EVALUATION_VERSION,
            artifact=readable(artifact),
            reference=readable(reference),
            device=str(where.device),
            text=Text(readable(text), file.sha256, len(windows.ids), context, len(windows), windows.positions),
            weights=Weights(summary.bits_per_weight, summary.cosine),
            scores=summarize(scorer.positions(), len(windows)),
            notes=notes,
        )


def _open_reference(model: Path | str) -> Artifact | Original:
    """An artifact where there is a manifest, else a checkpoint."""
    return open_artifact(model) if (Path(model) / MANIFEST).is_file() else open_original(resolve(model))


def _notes(name: str, teacher: Artifact | Original, device: Device) -> tuple[str, ...]:
    casts = [f"{name}: {text}" for text in teacher.notes] if isinstance(teacher, Original) else []
    return (*casts, *([device.note] if device.note else []))


def _checked_context(context: int | None, student: Artifact, teacher: Artifact | Original) -> int:
    a, b = student.spec, teacher.spec
    if a.vocab_size != b.vocab_size:
        raise DataError(
            f"{student.folder}: {a.vocab_size} tokens in the vocabulary, {teacher.folder} has {b.vocab_size}; "
            "compare an artifact with its own original"
        )
    most = min(a.context, b.context)
    if context is None:
        context = min(CONTEXT, most)
    if not (isinstance(context, int) and SHORTEST <= context <= most):
        raise UsageError(f"context {context}: these models take {SHORTEST} to {most} tokens")
    return context


def _tokenizer(model: Artifact | Original) -> Tokenizer:
    tokenizer = Tokenizer.load(model.folder)
    tokenizer.check_vocabulary(model.spec.vocab_size)
    return tokenizer


def _run(teacher: Side, student: Side, windows: Windows, on_progress: OnProgress) -> Scorer:
    scorer = Scorer()
    total = len(windows) * windows.context
    done = 0
    for ids in windows:
        # The logits after token i predict token i + 1: those after the last token of the first half come first.
        start = windows.first - 1
        for side in (teacher, student):
            side.begin(ids[:start])
        for at in range(start, len(ids) - 1, BLOCK):
            block = ids[at : min(at + BLOCK, len(ids) - 1)]
            following = ids[at + 1 : at + 1 + len(block)]
            expected = teacher.logits(block)
            scorer.add(expected, student.logits(block), torch.tensor(following, device=expected.device))
            on_progress(done + at + len(block), total)
        done += len(ids)
        on_progress(done, total)
    return scorer


def _quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""
    del done, total
