"""A checkpoint rounded to nearest at every bits and group: size, quality and speed, without writing an artifact.

Quality is that of :mod:`lbq.evaluation.comparison`: all cells read the same windows as the original, layer by layer,
and a cell's layer is quantised when it is its turn. Cells read together in batches whose hidden states take about
HIDDEN_BYTES. Cells in which every layer falls back to what it has in another are measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lbq.evaluation.metered import Metered
from lbq.evaluation.models import text_of, windows_of
from lbq.evaluation.scores import summarize
from lbq.evaluation.speed import decode_speed
from lbq.evaluation.storage import storage_of_plan
from lbq.evaluation.stream import HIDDEN_BYTES, OnProgress, Side, stream
from lbq.evaluation.windows import Windows, text_to_read
from lbq.formats.comparison import SWEEP_VERSION, Cell, Sweep
from lbq.formats.disk import readable
from lbq.formats.errors import UsageError
from lbq.formats.manifest import MANIFEST
from lbq.formats.packing import BITS, GROUPS
from lbq.formats.quality import Scores
from lbq.hub.client import OnNote, quiet
from lbq.quantizer.on_load import QuantizedOnLoad
from lbq.quantizer.original import Original
from lbq.quantizer.plan import keep_all
from lbq.quantizer.prepare import Prepared, prepare, replan
from lbq.quantizer.request import make_request
from lbq.quantizer.source import resolve
from lbq.runtime.devices import Device, device_errors, find_device, set_threads

Group = int | Literal["row"]

ALL_GROUPS: tuple[Group, ...] = (*GROUPS, "row")
PROMPT = 16  # tokens of the text that speed is measured behind


def sweep(
    model: Path | str,
    bits: Sequence[int] = BITS,
    groups: Sequence[Group] = ALL_GROUPS,
    text: Path | str | None = None,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    speed: bool = True,
    on_progress: OnProgress | None = None,
    on_note: OnNote = quiet,
) -> Sweep:
    """Measure ``model``, a checkpoint's folder or a Hub id, at each of ``bits`` with each of ``groups``.

    All else is as :func:`lbq.convert` has it, the head at 8 bits a row. ``text`` to ``threads`` are those of
    :func:`lbq.evaluate`; ``speed`` False leaves decoding out. Raises what these raise.
    """
    if threads is not None:
        set_threads(threads)
    if not (bits and groups):
        raise UsageError("nothing to sweep: give bits and groups")
    requests = [make_request(b, g) for b in dict.fromkeys(bits) for g in dict.fromkeys(groups)]
    exact = find_device(device, exact=True)
    file, most = text_to_read(text, max_tokens)
    if (Path(model) / MANIFEST).is_file():
        raise UsageError(f"{model}: an artifact, quantized already; sweep the checkpoint it was made from")
    first = prepare(resolve(model, on_note=on_note), requests[0])
    try:
        original = _original(first)
        plans = [first, *(replan(first, request) for request in requests[1:])]
        common = [text for text in first.plan.notes if all(text in each.plan.notes for each in plans)]
        notes = (*common, *([exact.note] if exact.note else []))
        for line in notes:
            on_note(line)
        windows = windows_of(file, (original,), context, most)
        run = _Run(str(model), original, windows, exact, find_device(device, exact=False) if speed else None)
        with device_errors():
            found = run.measure(plans, on_progress or _quiet)
        return Sweep(
            sweep_format=SWEEP_VERSION,
            model=readable(model),
            device=str(exact.device),
            text=text_of(file, windows),
            original=storage_of_plan("none", keep_all(first.source_spec, first.checkpoint, first.head_differs)),
            original_tokens_per_second=found.original_speed,
            cells=tuple(_cell(plan, found, notes) for plan in plans),
            notes=notes,
        )
    finally:
        first.checkpoint.close()


Key = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class _Measured:
    """What was measured of layers quantised in some way."""

    scores: Scores
    cosine: float
    speed: float | None


@dataclass(frozen=True)
class _Found:
    cells: dict[Key, _Measured]
    original_speed: float | None


class _Run:
    """One sweep's measurements."""

    def __init__(self, name: str, original: Original, windows: Windows, exact: Device, fast: Device | None) -> None:
        self._teacher, self._original = Side(name, original), original
        self._windows, self._exact, self._fast = windows, exact, fast

    def measure(self, plans: Sequence[Prepared], tell: OnProgress) -> _Found:
        """Every plan once, in batches."""
        different = {_key(plan): plan for plan in plans}
        total = len(different) * (2 if self._fast else 1) + (1 if self._fast else 0)
        side = len(self._windows) * self._windows.context * self._original.spec.hidden_size * 4
        many = max(1, HIDDEN_BYTES // side - 1)
        keys, scores = list(different), dict[Key, tuple[Scores, float]]()
        for start in range(0, len(keys), many):
            some = keys[start : start + many]

            def part(done: int, of: int, start: int = start, count: int = len(some)) -> None:
                tell(1000 * start + 1000 * count * done // of, 1000 * total)

            scores.update(zip(some, self._scores([different[key] for key in some], part), strict=True))
        speeds = dict[Key, float]()
        original_speed = None
        if self._fast:
            original_speed = self._speed(self._original, self._fast)
            tell(1000 * (len(keys) + 1), 1000 * total)
            for count, (key, plan) in enumerate(different.items(), len(keys) + 2):
                speeds[key] = self._speed(QuantizedOnLoad(plan, self._fast.device), self._fast)
                tell(1000 * count, 1000 * total)
        return _Found({key: _Measured(*scores[key], speeds.get(key)) for key in keys}, original_speed)

    def _scores(self, plans: Sequence[Prepared], tell: OnProgress) -> list[tuple[Scores, float]]:
        """Scores and weight cosines of plans that read together."""
        device = self._exact.device
        weights = [Metered(QuantizedOnLoad(plan, device), self._original, device) for plan in plans]
        sides = [Side(f"{self._teacher.name} {plan.default_name()}", w) for plan, w in zip(plans, weights, strict=True)]
        found = stream(self._teacher, sides, self._windows, self._exact, on_progress=tell)
        return [(summarize(f, len(self._windows)), w.cosine) for f, w in zip(found, weights, strict=True)]

    def _speed(self, weights: Original | QuantizedOnLoad, device: Device) -> float:
        speed = decode_speed(weights, device, next(iter(self._windows))[:PROMPT])
        if device.device.type == "cuda":
            torch.cuda.empty_cache()  # the next cell's weights need the room
        return speed


def _original(prepared: Prepared) -> Original:
    plan = keep_all(prepared.source_spec, prepared.checkpoint, prepared.head_differs)
    return Original(prepared.source, prepared.checkpoint, plan)


def _key(prepared: Prepared) -> Key:
    """What becomes of every layer: equal for cells that are the same model."""
    return tuple((name, entry.bits, entry.group) for name, entry in sorted(prepared.plan.quantized.items()))


def _cell(prepared: Prepared, found: _Found, common: Sequence[str]) -> Cell:
    scheme, measured = prepared.request.scheme, found.cells[_key(prepared)]
    return Cell(
        bits=scheme.bits,
        group=scheme.group,
        storage=storage_of_plan("lbq rtn", prepared.plan),
        weight_cosine=measured.cosine,
        scores=measured.scores,
        tokens_per_second=measured.speed,
        notes=tuple(text for text in prepared.plan.notes if text not in common),
    )


def _quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""
    del done, total
