"""Every width and group of a checkpoint: the numbers of artifacts that a conversion would write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lbq.conversion import convert
from lbq.evaluation import compare
from lbq.evaluation import sweep as module
from lbq.evaluation.sweep import sweep
from lbq.formats.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
CONTEXT = 64
TEXT = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_cells_are_what_conversions_are(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path) -> None:
    source = checkpoints["smollm2"]
    found = sweep(source, (4, 8), (32, "row"), text, context=CONTEXT, device="cpu", speed=False)
    assert [(cell.bits, cell.group) for cell in found.cells] == [(4, 32), (4, None), (8, 32), (8, None)]
    paths = [
        convert(source, tmp_path / f"{cell.bits}-{cell.group}", bits=cell.bits, group=cell.group or "row").path
        for cell in found.cells
    ]
    rows = compare(paths, source, text, context=CONTEXT, device="cpu").models
    for cell, row in zip(found.cells, rows, strict=True):
        assert cell.storage == row.storage
        assert cell.scores == row.scores
        assert cell.weight_cosine == row.weight_cosine
        assert cell.tokens_per_second is None
    original = compare([source], source, text, context=CONTEXT, device="cpu").models[0]
    assert found.original == original.storage
    assert found.original_tokens_per_second is None


def test_speed_of_every_cell_and_of_the_original(checkpoints: Mapping[str, Path], text: Path) -> None:
    told: list[tuple[int, int]] = []
    found = sweep(
        checkpoints["qwen2"],
        (3, 4),
        (32,),
        text,
        context=CONTEXT,
        device="cpu",
        on_progress=lambda *step: told.append(step),
    )
    speeds = [found.original_tokens_per_second, *(cell.tokens_per_second for cell in found.cells)]
    assert all(speed is not None and speed > 0 for speed in speeds)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    assert len({of for _, of in told}) == 1


def test_cells_that_fall_back_to_the_same_layers(checkpoints: Mapping[str, Path], text: Path) -> None:
    """64 and 96 inputs: from g64 on all are a row and g32."""
    found = sweep(checkpoints["llama"], (4,), (32, 64, 128, "row"), text, context=CONTEXT, device="cpu", speed=False)
    g32, g64, g128, row = found.cells
    assert g32.notes == row.notes == ()
    assert g64.notes == ("96 inputs do not divide into groups of 64: groups of 32 instead (2 layers)",)
    assert len(g128.notes) == 2
    assert (g64.scores, g64.storage) == (g128.scores, g128.storage)
    assert g64.scores != g32.scores
    assert g64.scores != row.scores


def test_batches_change_nothing(checkpoints: Mapping[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (checkpoints["llama"], (3, 4, 8), (32, "row"), text)
    options: dict[str, Any] = {"context": CONTEXT, "device": "cpu", "speed": False}
    whole = sweep(*arguments, **options)
    windows = whole.text.windows
    monkeypatch.setattr(module, "HIDDEN_BYTES", 3 * windows * CONTEXT * 64 * 4)  # two cells beside the original
    told: list[tuple[int, int]] = []
    assert sweep(*arguments, on_progress=lambda *step: told.append(step), **options) == whole
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_notes_that_all_cells_share(make_checkpoint: Callable[..., Path], text: Path) -> None:
    import torch

    source = make_checkpoint("llama", dtype=torch.float32, frobnicate=1)
    notes: list[str] = []
    options: dict[str, Any] = {"context": CONTEXT, "device": "cpu", "speed": False}
    found = sweep(source, (4,), (32, 64), text, on_note=notes.append, **options)
    assert found.notes == tuple(notes)
    assert "config.json: unknown keys are ignored: frobnicate" in found.notes
    assert "tensors that stay are rounded from float32 to bfloat16" in found.notes
    assert [len(cell.notes) for cell in found.cells] == [0, 1]


def test_refusals(checkpoints: Mapping[str, Path], kept_artifact: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to sweep"):
        sweep(checkpoints["llama"], (), (32,), text)
    with pytest.raises(UsageError, match="5 bits"):
        sweep(checkpoints["llama"], (5,), (32,), text)
    with pytest.raises(UsageError, match="group size 48"):
        sweep(checkpoints["llama"], (4,), (48,), text)
    with pytest.raises(UsageError, match="an artifact, quantized already"):
        sweep(kept_artifact, (4,), (32,), text)
    with pytest.raises(DataError, match=r"no config\.json"):
        sweep(tmp_path, (4,), (32,), text)


def test_command(lbq: Lbq, checkpoints: Mapping[str, Path], text: Path) -> None:
    arguments = ("sweep", checkpoints["llama"], "--bits", "4", "--gs", "32, 64", "--text", text, "--context", CONTEXT)
    options = ("--device", "cpu", "--no-speed")
    shown = lbq(*arguments, *options)
    assert (shown.code, shown.err) == (0, "")
    assert "INT4 g32 " in shown.out
    assert "INT4 g64*" in shown.out
    assert "* g64: 96 inputs do not divide into groups of 64" in shown.out
    assert "tokens/s" not in shown.out
    lines = lbq(*arguments, *options, "--markdown").out.splitlines()
    cells = [line.split("|") for line in lines if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    assert [row[1].strip() for row in cells] == ["", "---", "BF16", "INT4 g32", "INT4 g64*"]
    found = json.loads(lbq(*arguments, "--device", "cpu", "--json").out)
    assert [cell["group"] for cell in found["cells"]] == [32, 64]
    assert found["cells"][0]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", "four"), "'four' is no number"),
        (("--gs", "64,"), "'' is no number"),
        (("--gs", "65"), "group size 65"),
        (("--bits", "2"), "2 bits are not supported"),
    ],
)
def test_command_refuses(lbq: Lbq, checkpoints: Mapping[str, Path], options: tuple[str, ...], says: str) -> None:
    shown = lbq("sweep", checkpoints["llama"], *options)
    assert shown.code == 2
    assert says in shown.error
