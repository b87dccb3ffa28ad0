"""The script that sets cosines beside divergences."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import lbq
from lbq.quantizer.rtn import ScaleRule, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 8


@pytest.fixture
def measure_cosines() -> Iterator[Any]:
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    yield importlib.import_module("measure_cosines")
    sys.path.remove(scripts)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [None, 32])
def test_rounds_as_lbq_does(measure_cosines: Any, bits: int, group: int | None) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits)).to(torch.bfloat16)
    for rule in (ScaleRule.ABSMAX, ScaleRule.SIGNED_L4):
        found = measure_cosines.Setting(bits, group, rule).of(weight)
        assert torch.equal(found, quantize(weight, bits, group, rule).dequantize())


def test_two_bits_have_four_levels(measure_cosines: Any) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    signed = measure_cosines.Setting(2, None, ScaleRule.SIGNED).of(weight)
    assert all(len(row.unique()) == 4 for row in signed)
    absmax = measure_cosines.Setting(2, None, ScaleRule.ABSMAX).of(weight)
    assert all(len(row.unique()) == 3 for row in absmax)


def test_table(measure_cosines: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(WORDS)
    lbq.convert(checkpoint, tmp_path / "made", bits=3, group=32, lm_head=16, device="cpu")
    arguments = [checkpoint, "--text", tmp_path / "text.txt", "--with", tmp_path / "made", "--gs", 32]
    options = ["--context", 64, "--max-tokens", 192, "--threads", 1]
    done = CliRunner().invoke(measure_cosines.main, [str(part) for part in (*arguments, *options)])
    assert done.exit_code == 0, done.output
    rows = [line.split("|")[1:-1] for line in done.output.splitlines() if line.startswith("|")][2:]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert len(cells) == 13
    assert cells["made"] == cells["INT3 g32, signed-l4"]  # the same weights by another way
    assert "Wrong by the weight cosine:" in done.output
    assert "INT3:" in done.output


def test_weights_alone(measure_cosines: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", num_hidden_layers=1)
    lbq.convert(checkpoint, tmp_path / "made", bits=3, group=32, lm_head=16, device="cpu")
    arguments = [str(part) for part in (checkpoint, "--with", tmp_path / "made", "--gs", 32, "--threads", 1)]
    done = CliRunner().invoke(measure_cosines.main, arguments)
    assert done.exit_code == 0, done.output
    rows = [line.split("|")[1:-1] for line in done.output.splitlines() if line.startswith("|")][2:]
    cells = {row[0].strip(): row[1:] for row in rows}
    assert len(cells) == 13
    assert cells["made"] == cells["INT3 g32, signed-l4"]
