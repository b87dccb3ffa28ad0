"""The script that sets other tools beside lbq, with the tools that the tests have."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
WORDS = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 8


@pytest.fixture
def measure_peers() -> Iterator[Any]:
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    yield importlib.import_module("measure_peers")
    sys.path.remove(scripts)


def test_tools_side_by_side(measure_peers: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(WORDS)
    (tmp_path / "train.json").write_text(json.dumps([{"text": WORDS}] * 3))
    arguments = [checkpoint, "--out", tmp_path / "peers", "--text", tmp_path / "text.txt"]
    options = ["--calib", tmp_path / "train.json", "--gs", 32, "--nsamples", 2, "--seqlen", 64, "--threads", 1]
    names = ["--tools", "lbq-rtn,autoround-rtn,hqq-g32"]
    done = CliRunner().invoke(measure_peers.main, [str(part) for part in (*arguments, *options, *names)])
    assert done.exit_code == 0, done.output
    rows = [line.split("|") for line in done.output.splitlines() if line.startswith("|")]
    bits = {row[1].strip(): row[2].strip() for row in rows[2:]}
    assert bits["lbq-rtn-int4"] == "4.50"
    assert float(bits["autoround-rtn-int4"]) == pytest.approx(4.625, abs=0.006)  # four bits a zero point
    assert bits.get("hqq-g32-int4", "5.00") == "5.00"
    if "hqq-g32-int4" not in bits:
        assert "hqq-g32: hqq is not installed" in done.output
