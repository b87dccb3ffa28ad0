"""Several models against one original: artifacts and what other tools made, on the same windows in one pass.

Differences between models are known better than the models themselves: windows that are hard for one are hard for all,
so the difference is taken window by window, and its standard error is that of these differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbq.evaluation.metered import Metered, check_layers
from lbq.evaluation.models import open_model, open_stored, text_of, windows_of
from lbq.evaluation.scores import Positions, estimate, summarize
from lbq.evaluation.storage import storage_of
from lbq.evaluation.stream import OnProgress, Side, stream
from lbq.evaluation.windows import Windows, text_to_read
from lbq.formats.artifact import Artifact
from lbq.formats.comparison import COMPARISON_VERSION, Compared, Comparison
from lbq.formats.disk import readable
from lbq.formats.errors import UsageError
from lbq.formats.tokenizer_file import TOKENIZER
from lbq.hub.client import OnNote, quiet
from lbq.quantizer.foreign import ForeignCheckpoint
from lbq.quantizer.original import Original
from lbq.runtime.devices import Device, device_errors, find_device, set_threads

Stored = Artifact | ForeignCheckpoint


def compare(
    models: Sequence[Path | str],
    reference: Path | str | None = None,
    text: Path | str | None = None,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote = quiet,
) -> Comparison:
    """Compare artifacts and checkpoints of other tools (folders or Hub ids) side by side, in the order given.

    Against a ``reference``, the original, all are measured as :func:`lbq.evaluate` does, whose arguments these are;
    without one nothing is run, and the result says what headers and manifests say.

    Raises UsageError for arguments, StorageError and DataError for files and for models that cannot be compared,
    RemoteError for the Hub, DeviceError for the device.
    """
    if not models:
        raise UsageError("no models to compare")
    if reference is None and not (text is None and context is None and max_tokens is None):
        raise UsageError("a text is read against an original: give it too")
    if threads is not None:
        set_threads(threads)
    with ExitStack() as stack:
        students = [_Student(str(model), _opened(stack, model, on_note)) for model in models]
        if reference is None:
            _tell(on_note, (), students)
            return Comparison(COMPARISON_VERSION, None, None, None, tuple(map(_unmeasured, students)), ())
        where = find_device(device, exact=True)
        file, most = text_to_read(text, max_tokens)
        teacher = open_model(reference, on_note)
        stack.enter_context(teacher)
        for student in students:
            check_layers(student.name, student.model.spec, teacher.spec)
        notes = _notes(str(reference), teacher, where.note)
        _tell(on_note, notes, students)
        with_text = [student.model for student in students if student.has_tokenizer]
        windows = windows_of(file, (teacher, *with_text), context, most)
        return Comparison(
            comparison_format=COMPARISON_VERSION,
            reference=readable(reference),
            device=str(where.device),
            text=text_of(file, windows),
            models=_measure(Side(str(reference), teacher), students, windows, where, on_progress),
            notes=notes,
        )


def _measure(
    teacher: Side, students: Sequence[_Student], windows: Windows, device: Device, on_progress: OnProgress | None
) -> tuple[Compared, ...]:
    """Everything that there is to measure, in one pass."""
    metered = [Metered(student.model, teacher.weights, device.device) for student in students]
    sides = [Side(student.name, weights) for student, weights in zip(students, metered, strict=True)]
    with device_errors():
        found = stream(teacher, sides, windows, device, on_progress=on_progress)
    measured = zip(students, metered, found, strict=True)
    return tuple(_measured(student, each.cosine, kl, found[0], len(windows)) for student, each, kl in measured)


@dataclass(frozen=True)
class _Student:
    """A model as it was called."""

    name: str
    model: Stored

    @property
    def has_tokenizer(self) -> bool:
        return (self.model.folder / TOKENIZER).is_file()

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say, besides what a manifest says."""
        own = () if isinstance(self.model, Artifact) else self.model.notes
        return own if self.has_tokenizer else (*own, f"no {TOKENIZER}: it reads the original's tokens")


def _opened(stack: ExitStack, name: Path | str, on_note: OnNote) -> Stored:
    model = open_stored(name, on_note)
    stack.enter_context(model)
    return model


def _unmeasured(student: _Student) -> Compared:
    model = student.model
    cosine = model.manifest.summary.cosine if isinstance(model, Artifact) else None
    return Compared(readable(student.name), storage_of(model), cosine, None, None, student.notes)


def _measured(student: _Student, cosine: float, found: Positions, first: Positions, windows: int) -> Compared:
    """``first``: what the first model was found to do, with which others are compared."""
    difference = None if found is first else estimate(found.kl - first.kl, windows)
    scores = summarize(found, windows)
    return Compared(readable(student.name), storage_of(student.model), cosine, scores, difference, student.notes)


def _notes(name: str, teacher: Artifact | Original, device: str | None) -> tuple[str, ...]:
    casts = [f"{name}: {text}" for text in teacher.notes] if isinstance(teacher, Original) else []
    return (*casts, *([device] if device else []))


def _tell(on_note: OnNote, notes: Sequence[str], students: Sequence[_Student]) -> None:
    for line in (*notes, *(f"{student.name}: {text}" for student in students for text in student.notes)):
        on_note(line)
