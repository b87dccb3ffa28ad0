"""The measured part of an artifact's report: the fresh artifact against its source, before it appears."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lbq.evaluation.models import text_of, windows_of
from lbq.evaluation.scores import summarize
from lbq.evaluation.stream import OnProgress, Side, stream
from lbq.evaluation.windows import BUNDLED_TOKENS, bundled_text, read_text
from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DeviceError, UsageError
from lbq.formats.quality import Quality
from lbq.quantizer.original import open_original
from lbq.quantizer.prepare import Prepared
from lbq.runtime.devices import device_errors, find_device

Kind = Literal["weights", "kl", "full"]


@dataclass(frozen=True)
class ReportRequest:
    """``--report KIND --text FILE --report-tokens N``. Raises UsageError for what makes no sense.

    ``weights`` is what a conversion sees of the weights as they pass; ``kl`` adds the artifact's scores against its
    source on the first ``tokens`` tokens of ``text``, by default of the one that ships with lbq; ``full`` adds what
    each unit does alone, and the frontier that follows (:mod:`lbq.evaluation.study`).
    """

    kind: Kind = "weights"
    text: Path | None = None
    tokens: int | None = None  # None: BUNDLED_TOKENS, of any text

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"--report {self.kind}: {', '.join(get_args(Kind))}")
        if self.kind == "weights" and not (self.text is None and self.tokens is None):
            raise UsageError("--text and --report-tokens are for --report kl and full")
        if self.tokens is not None and not (isinstance(self.tokens, int) and self.tokens >= 1):
            raise UsageError(f"--report-tokens {self.tokens!r}: a positive number is needed")


class Measurement:
    """Scores an artifact that is whole and has not appeared yet: see :func:`lbq.quantizer.convert.write_artifact`.

    Text, tokenizer and device are looked at when this is made: what is wrong with them is said before a conversion.
    """

    def __init__(
        self, request: ReportRequest, prepared: Prepared, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> None:
        """Raises what reading a text and finding a device raise, and DataError for a source without a tokenizer."""
        self._source = replace(prepared.source, remote=None)  # when it is read, all of it is here
        self.device = find_device(device, exact=True)  # its note is the caller's to say
        if prepared.request.strict and self.device.note is not None:
            raise DeviceError(f"{self.device.note}; refused under --strict")
        self._file = bundled_text() if request.text is None else read_text(request.text)
        self._windows = windows_of(self._file, (prepared,), None, request.tokens or BUNDLED_TOKENS)

    def measure(self, folder: Path, on_progress: OnProgress | None = None) -> Quality:
        """The artifact in ``folder`` against its source. Raises DataError for broken weights, DeviceError."""
        windows = self._windows
        with open_original(self._source) as original, open_artifact(folder) as artifact, device_errors():
            teacher, student = Side(self._source.name, original), Side("the artifact", artifact)
            (found,) = stream(teacher, [student], windows, self.device, on_progress=on_progress)
        name = self._file.path.name  # a report travels: where the text lay is nobody's business
        return Quality(text_of(self._file, windows, name), summarize(found, len(windows)), str(self.device.device))
