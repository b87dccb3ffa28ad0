"""An artifact against its original: both read the same windows of a text, layer by layer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from lbq.evaluation.models import open_model, text_of, windows_of
from lbq.evaluation.scores import summarize
from lbq.evaluation.stream import OnProgress, Side, check_alike, stream
from lbq.evaluation.windows import text_to_read
from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.disk import readable
from lbq.formats.quality import EVALUATION_VERSION, Evaluation, Weights
from lbq.hub.artifacts import find_artifact
from lbq.hub.client import OnNote, quiet
from lbq.quantizer.original import Original
from lbq.runtime.devices import Device, device_errors, find_device, set_threads


def evaluate(
    artifact: Path | str,
    reference: Path | str,
    text: Path | str | None = None,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> Evaluation:
    """Compare ``artifact`` with ``reference`` (a checkpoint or another artifact) on a text file.

    Both are folders or Hub ids; ``text`` is by default the one that ships with lbq. ``context`` is the length of a
    window, by default 512 or what the models were made for; ``max_tokens`` bounds the text, by default to all of it, or
    4096 of lbq's. Both models run layer by layer in float32, so that the weights alone differ. ``threads`` is torch's
    number of them, for the whole process. ``on_note`` hears of what differs from what one would expect, before the
    work; the result has it too.

    Raises UsageError for arguments, StorageError and DataError for files and for models that cannot be compared,
    RemoteError for the Hub, DeviceError for the device.
    """
    if threads is not None:
        set_threads(threads)
    where = find_device(device, exact=True)
    file, most = text_to_read(text, max_tokens)
    with ExitStack() as stack:
        student = stack.enter_context(open_artifact(find_artifact(artifact, on_note=on_note or quiet)))
        teacher = open_model(reference, on_note or quiet)
        stack.enter_context(teacher)
        sides = Side(str(reference), teacher), Side(str(artifact), student)
        check_alike(*sides)
        notes = _notes(str(reference), teacher, where)
        if on_note is not None:
            for line in notes:
                on_note(line)
        windows = windows_of(file, (teacher, student), context, most)
        with device_errors():
            (found,) = stream(sides[0], sides[1:], windows, where, on_progress=on_progress)
        summary = student.manifest.summary
        return Evaluation(
            eval_format=EVALUATION_VERSION,
            artifact=readable(artifact),
            reference=readable(reference),
            device=str(where.device),
            text=text_of(file, windows),
            weights=Weights(summary.bits_per_weight, summary.cosine),
            scores=summarize(found, len(windows)),
            notes=notes,
        )


def _notes(name: str, teacher: Artifact | Original, device: Device) -> tuple[str, ...]:
    casts = [f"{name}: {text}" for text in teacher.notes] if isinstance(teacher, Original) else []
    return (*casts, *([device.note] if device.note else []))
