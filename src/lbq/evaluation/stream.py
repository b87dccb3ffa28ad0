"""Models that read the same windows of a text in one pass, layer by layer: a teacher, and students scored against it.

    found = stream(Side("MODEL", original), [Side("INT4", artifact)], windows, find_device("auto", exact=True))
    summarize(found[0], len(windows))  # → formats.quality.Scores

    Side(name: str, weights: Weights, own: frozenset[int] | None = None)
    read(teacher, students, windows, device, collectors, …)  # the same with collectors of one's own, one a student
    stream(teacher: Side, students: Sequence[Side], windows: Windows, device: Device, *,
           on_progress: (done, total) → None, hidden_bytes: int) → tuple[Positions, ...]  # one a student, in order

A layer is bound, every window's hidden states go through it, and it is dropped before the next one is bound; then norm
and head turn a block of positions at a time into logits, these into numbers a position, and nothing else is kept. So
memory is one layer, two heads, and the hidden states: tokens × hidden × 4 bytes for every side. Never a model: whatever
its size, it is read from the disk once, or once for every ``hidden_bytes`` of hidden states where there are more.

``weights`` is anything that a runtime can bind: an artifact, an original, what is quantised on load, or an overlay of
these. ``own`` numbers the layers in which a student differs from the teacher, the number of layers standing for norm
and head; None is all of it, the embedding too. Up to its first own layer a student does not exist: it begins as a copy
of the teacher's hidden states. In layers that are not its own it shares those of the teacher, bound once for all. So a
hundred students that each differ in one linear cost little memory, and half a pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from lbq.evaluation.scores import Positions, Scorer
from lbq.evaluation.windows import Windows
from lbq.formats.errors import DataError
from lbq.runtime.binding import Binder, Weights
from lbq.runtime.decoder import CHUNK, DecoderLayer
from lbq.runtime.devices import Device
from lbq.runtime.step import HostStep

BLOCK = 256  # positions whose logits are held at a time
HIDDEN_BYTES = 2 << 30  # of hidden states, all sides together; a longer text is read in several passes

OnProgress = Callable[[int, int], None]  # steps done, steps in all; a step takes a window through a layer
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Side:
    """A model that reads. ``name`` is what errors call it; ``weights`` and ``own`` as in the module's docstring."""

    name: str
    weights: Weights
    own: frozenset[int] | None = None

    @property
    def layers(self) -> int:
        """How many there are, and the number that stands for norm and head in ``own``."""
        return len(self.weights.spec.layers)

    @property
    def first(self) -> int:
        """The first layer that is this side's own."""
        return 0 if self.own is None else min(self.own, default=self.layers)

    def owns(self, i: int) -> bool:
        """Whether layer ``i`` differs from the teacher's."""
        return self.own is None or i in self.own


class Collector(Protocol):
    """What becomes of logits: a :class:`Scorer`, or anything else that reads them."""

    def add(self, reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> None:
        """The teacher's logits and the student's, [T, V] on one device, and the tokens that follow, int64 [T]."""
        ...


def stream(
    teacher: Side,
    students: Sequence[Side],
    windows: Windows,
    device: Device,
    *,
    on_progress: OnProgress | None = None,
    hidden_bytes: int = HIDDEN_BYTES,
) -> tuple[Positions, ...]:
    """Score every student against the teacher at the predicted positions of all windows, in order.

    Activations are float32, and ``device`` should be exact: then weights alone make a difference. Raises DataError for
    sides of different shapes and for logits that are not finite.
    """
    scorers = [Scorer(windows.positions) for _ in students]
    read(teacher, students, windows, device, scorers, on_progress=on_progress, hidden_bytes=hidden_bytes)
    return tuple(scorer.positions() for scorer in scorers)


def read(
    teacher: Side,
    students: Sequence[Side],
    windows: Windows,
    device: Device,
    collectors: Sequence[Collector],
    *,
    on_progress: OnProgress | None = None,
    hidden_bytes: int = HIDDEN_BYTES,
) -> None:
    """As :func:`stream`, but the logits at predicted positions go to ``collectors``, one a student."""
    check_alike(teacher, *students)
    spec = teacher.weights.spec
    progress = _Progress(teacher, students, len(windows), on_progress)
    each = (1 + len(students)) * windows.context * spec.hidden_size * 4
    ids = torch.tensor(list(windows))
    for some in ids.split(max(1, hidden_bytes // each)):
        _Pass(teacher, students, some, device, progress).run(collectors, windows.first)


def check_alike(teacher: Side, *students: Side) -> None:
    """Raise DataError, in one line, for a student that is not of the teacher's shape."""
    assert teacher.own is None
    for student in students:
        a, b = teacher.weights.spec, student.weights.spec
        for what, yours, mine in (
            ("tokens in the vocabulary", a.vocab_size, b.vocab_size),
            ("layers", len(a.layers), len(b.layers)),
            ("dimensions of hidden states", a.hidden_size, b.hidden_size),
        ):
            if mine != yours:
                raise DataError(
                    f"{student.name}: {mine} {what}, {teacher.name} has {yours}; "
                    "compare an artifact with its own original"
                )


class _Progress:
    """Counts steps: a window through a layer is one, a window's logits as many as the head has layers' weights."""

    def __init__(self, teacher: Side, students: Sequence[Side], windows: int, tell: OnProgress | None) -> None:
        spec = teacher.weights.spec
        weights = sum(p.out_features * p.in_features for unit in spec.layer_units(0) for p in unit)
        self.logits = max(1, round(spec.vocab_size * spec.hidden_size / 2 / weights))  # half the positions
        owners = sum(student.owns(teacher.layers) for student in students)
        groups = owners + (owners < len(students))
        layers = sum(side.layers - side.first for side in (teacher, *students))
        self._done, self._total = 0, windows * (layers + self.logits * (groups + len(students)))
        self._tell = tell

    def step(self, count: int = 1) -> None:
        self._done += count
        if self._tell is not None:
            self._tell(self._done, self._total)


class _Reader:
    """A side, and how far it has read."""

    def __init__(self, side: Side, device: Device) -> None:
        self.side, self._device = side, device
        self.binder = Binder(side.weights, device)
        self.hidden = torch.empty(0)  # float32 [windows, T, hidden] once it has begun

    def embed(self, ids: torch.Tensor) -> None:
        """Begin by one's own embedding, with windows int64 [windows, T]."""
        name = f"{self.side.weights.spec.embedding}.weight"
        table = self.side.weights.dense(name)
        self.hidden = functional.embedding(ids.to(table.device), table).to(self._device.device, torch.float32)
        self.side.weights.release_dense(name)

    def head(self) -> Head:
        """Norm and head: float32 [T, hidden] to logits [T, V]."""
        norm, head = self.binder.norm(), self.binder.head()
        return lambda x: head(norm(x))

    def advance(self, layer: DecoderLayer) -> Iterator[None]:
        """Take the windows through ``layer`` one after the other."""
        length = self.hidden.shape[1]
        state = layer.mixer.new_state(length, dtype=torch.float32, device=self._device.device, fixed=True)
        for window in self.hidden:
            state.truncate(0)
            for start in range(0, length, CHUNK):
                part = window[start : start + CHUNK]
                layer(part, state, HostStep(start, part.shape[0], self._device.device))
            yield

    def logits(self, head: Head, window: int, start: int, stop: int) -> torch.Tensor:
        """After tokens [start, stop) of a window, float32 [T, V]. Raises DataError if they are not finite."""
        logits = head(self.hidden[window, start:stop])
        if not bool(logits.isfinite().all()):
            raise DataError(f"{self.side.name}: the logits are not finite; the weights are broken")
        return logits


class _Pass:
    """Some windows, int64 [windows, T], on their way through all sides."""

    def __init__(
        self, teacher: Side, students: Sequence[Side], ids: torch.Tensor, device: Device, progress: _Progress
    ) -> None:
        self._teacher = _Reader(teacher, device)
        self._students = [_Reader(student, device) for student in students]
        self._ids, self._progress = ids, progress

    @torch.inference_mode()
    def run(self, collectors: Sequence[Collector], first: int) -> None:
        """All layers, then the logits at the positions that predict token ``first`` of a window and those behind."""
        self._teacher.embed(self._ids)
        for i in range(self._teacher.side.layers):
            self._layer(i)
        self._begin(self._teacher.side.layers)
        pairs = list(zip(self._students, collectors, strict=True))
        expected = self._teacher.head()
        sharing = [pair for pair in pairs if not pair[0].side.owns(pair[0].side.layers)]
        if sharing:
            self._score(expected, expected, sharing, first)
        for student, collector in pairs:
            if student.side.owns(student.side.layers):
                self._score(expected, student.head(), [(student, collector)], first)
                student.binder.release_head()
        del expected
        self._teacher.binder.release_head()

    def _begin(self, i: int) -> None:
        """Students whose first own layer is ``i`` begin."""
        for student in self._students:
            if student.side.first == i:
                if student.side.own is None:
                    student.embed(self._ids)
                else:
                    student.hidden = self._teacher.hidden.clone()

    def _layer(self, i: int) -> None:
        """Everybody who has begun goes through layer ``i``, the teacher's or their own."""
        self._begin(i)
        begun = [student for student in self._students if student.side.first <= i]
        self._through(i, self._teacher, [self._teacher, *(s for s in begun if not s.side.owns(i))])
        for student in begun:
            if student.side.owns(i):
                self._through(i, student, [student])

    def _through(self, i: int, owner: _Reader, readers: Sequence[_Reader]) -> None:
        """``readers`` go through ``owner``'s layer ``i``, which is there no longer than that."""
        layer = owner.binder.layer(i)
        for reader in readers:
            for _ in reader.advance(layer):
                self._progress.step()
        del layer
        owner.binder.release_layer(i)

    def _score(self, expected: Head, head: Head, pairs: Sequence[tuple[_Reader, Collector]], first: int) -> None:
        """Students behind one head; the logits after token i predict token i + 1."""
        for window, ids in enumerate(self._ids):
            for start in range(first - 1, len(ids) - 1, BLOCK):
                stop = min(start + BLOCK, len(ids) - 1)
                reference = self._teacher.logits(expected, window, start, stop)
                following = ids[start + 1 : stop + 1].to(reference.device)
                for student, collector in pairs:
                    collector.add(reference, student.logits(head, window, start, stop), following)
            self._progress.step(self._progress.logits * (1 + len(pairs)))
