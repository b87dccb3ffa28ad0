"""Models read layer by layer: the scores of whole models, what is shared, and how little is held."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from lbq.conversion import convert
from lbq.evaluation.models import windows_of
from lbq.evaluation.scores import Positions, Scorer
from lbq.evaluation.stream import Side, stream
from lbq.evaluation.windows import TextFile, Windows
from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.quantizer.original import Original, open_original
from lbq.quantizer.source import resolve
from lbq.runtime.binding import Weights, bind
from lbq.runtime.devices import CpuDevice
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.kernels.linear import Linear

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = CpuDevice(exact=True)
FILE = TextFile(Path("text.txt"), "The lighthouse keeper climbed the stairs each evening at the same hour. " * 4, "")


@dataclass
class Overlay:
    """``base``, but for modules whose names hold one of ``parts``: these are ``over``'s."""

    base: Original
    over: Artifact
    parts: tuple[str, ...]
    asked: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec = self.base.spec

    def is_quantized(self, module: str) -> bool:
        return any(part in module for part in self.parts)

    def packed(self, module: str) -> PackedWeight:
        self.asked.append(module)
        return self.over.packed(module)

    def dense(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.base.dense(name)

    def release(self, module: str) -> None:
        self.released.append(module)

    def release_dense(self, name: str) -> None:
        self.released.append(name)


@pytest.fixture
def original(checkpoints: Mapping[str, Path]) -> Iterator[Original]:
    with open_original(resolve(checkpoints["llama"])) as opened:
        yield opened


@pytest.fixture
def quantized(kept_artifact: Path) -> Iterator[Artifact]:
    with open_artifact(kept_artifact) as opened:
        yield opened


def cut(model: Original | Artifact, context: int = 64) -> Windows:
    return windows_of(FILE, (model,), context, None)


def run(teacher: Weights, *students: Side, windows: Windows, **options: int) -> tuple[Positions, ...]:
    return stream(Side("teacher", teacher), students, windows, CPU, **options)  # type: ignore[arg-type]


def equal(one: Positions, other: Positions) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_scores_are_those_of_whole_models(checkpoints: Mapping[str, Path], family: str, tmp_path: Path) -> None:
    path = convert(checkpoints[family], tmp_path / "out", group=32, device="cpu").path
    with open_original(resolve(checkpoints[family])) as original, open_artifact(path) as artifact:
        windows = cut(original)
        scorer = Scorer(windows.positions)
        engines = [DecoderEngine(bind(weights, CPU).decoder, 64) for weights in (original, artifact)]
        half = slice(windows.first - 1, -1)
        for ids in windows:
            for engine in engines:
                engine.truncate(0)
            reference, logits = (engine.all_logits(ids)[half] for engine in engines)
            scorer.add(reference, logits, torch.tensor(ids[windows.first :]))
        (found,) = run(original, Side("student", artifact), windows=windows)
    for one, other in zip(vars(found).values(), vars(scorer.positions()).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert found.kl.mean() > 1e-3


@pytest.mark.parametrize("context", [20, 128])
def test_chunks_and_passes_change_nothing(
    original: Original, quantized: Artifact, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, student = cut(original, context), Side("student", quantized)
    (whole,) = run(original, student, windows=windows)
    (passes,) = run(original, student, windows=windows, hidden_bytes=2 * 2 * context * 64 * 4 + 1)
    assert equal(whole, passes)
    monkeypatch.setattr("lbq.evaluation.stream.CHUNK", 7)
    (chunks,) = run(original, student, windows=windows)
    np.testing.assert_allclose(chunks.kl, whole.kl, rtol=1e-3, atol=1e-6)


UNITS: dict[str, tuple[tuple[str, ...], set[int]]] = {
    "first layer": (("layers.0.mlp.down_proj",), {0}),
    "last layer": (("layers.1.self_attn.o_proj",), {1}),
    "head": (("lm_head",), {2}),
    "layer and head": (("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "lm_head"), {1, 2}),
    "nothing": ((), set()),
}


def test_what_is_shared_makes_no_difference(original: Original, quantized: Artifact) -> None:
    """Students that say where they differ, all in one pass, against the same ones as whole models, each alone."""
    windows = cut(original)
    overlays = [Overlay(original, quantized, parts) for parts, _ in UNITS.values()]
    students = [
        Side(name, overlay, frozenset(own)) for overlay, (name, (_, own)) in zip(overlays, UNITS.items(), strict=True)
    ]
    together = run(original, *students, Side("whole", quantized), windows=windows)
    for student, found in zip(students, together, strict=False):
        (alone,) = run(original, Side(student.name, student.weights), windows=windows)
        assert equal(alone, found)
        assert (found.kl.max() > 1e-5) == bool(student.own)
    (alone,) = run(original, Side("whole", quantized), windows=windows)
    assert equal(alone, together[-1])


def test_a_student_is_asked_for_its_own_layers_alone(original: Original, quantized: Artifact) -> None:
    overlay = Overlay(original, quantized, ("layers.1.mlp.down_proj",))
    run(original, Side("student", overlay, frozenset({1})), windows=cut(original))
    assert all("layers.1." in name for name in overlay.asked)
    linears = {name.removesuffix(".weight") for name in overlay.asked if "norm" not in name}
    assert linears <= {name.removesuffix(".weight") for name in overlay.released}


def test_layers_are_dropped(original: Original, quantized: Artifact) -> None:
    """Never more than the linears of one layer, or two heads, however many students there are."""
    windows, counting = cut(original), Counting()
    overlay = Overlay(original, quantized, ("layers.0.mlp.down_proj",))
    sides = [Side("a", quantized), Side("b", quantized), Side("c", overlay), Side("d", overlay, frozenset({0}))]
    stream(Side("teacher", original), sides, windows, counting)  # type: ignore[arg-type]
    assert counting.made == 4 * (2 * 4 + 1) + 4  # the last one's single layer; the rest of it is the teacher's
    assert counting.most == 4


@dataclass
class Counting:
    """A device whose linears are counted while they live."""

    most: int = 0
    made: int = 0
    live: weakref.WeakSet[Linear] = field(default_factory=weakref.WeakSet)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        return self._counted(CPU.packed(weight, bias))

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return self._counted(CPU.dense(weight, bias))

    def _counted(self, linear: Linear) -> Linear:
        self.live.add(linear)
        self.made += 1
        self.most = max(self.most, len(self.live))
        return linear


def test_progress_ends_where_it_says(original: Original, quantized: Artifact) -> None:
    told: list[tuple[int, int]] = []
    overlay = Overlay(original, quantized, ("layers.1.mlp.down_proj",))
    sides = [Side("a", quantized), Side("b", overlay, frozenset({1})), Side("c", overlay, frozenset({2}))]
    stream(
        Side("teacher", original),
        sides,
        cut(original),
        CPU,
        on_progress=lambda *at: told.append(at),
        hidden_bytes=1,
    )
    assert told == sorted(set(told))
    assert told[-1][0] == told[-1][1]


def test_models_of_other_shapes(original: Original, write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for option, message in (
        ({"num_hidden_layers": 3}, "other: 3 layers, teacher has 2; compare an artifact with its own original"),
        ({"hidden_size": 32}, "other: 32 dimensions of hidden states, teacher has 64"),
    ):
        folder = write_checkpoint(tmp_path / str(len(message)), **option)
        with open_original(resolve(folder)) as other, pytest.raises(DataError, match=message):
            run(original, Side("other", other), windows=cut(original))
