"""Conversions of every kind that are killed at random points, again and again, end with the same bytes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_stub import Hub

HARNESS = Path(__file__).with_name("kill_harness.py")
AUTOROUND: dict[str, Any] = {"method": "autoround", "iters": 2, "nsamples": 3, "seqlen": 12, "batch_size": 2}
TARGET: dict[str, Any] = {"target_bpw": 4.5, "report_tokens": 256}

Kill = Callable[..., tuple[int, int]]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(3).choices("the quick brown fox", k=2000)))
    return str(path)


@pytest.fixture
def kill(tmp_path: Path) -> Kill:
    """``kill(source, rounds, …)``: how often a conversion was killed, and how often a later run found work."""

    def run(source: Path | str, rounds: int, **options: Any) -> tuple[int, int]:
        (tmp_path / "work").mkdir()
        command = [sys.executable, HARNESS, source, tmp_path / "work", rounds, json.dumps(options)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        kills, resumed = map(int, done.stdout.split())
        return kills, resumed

    return run


def test_autoround(make_checkpoint: Callable[..., Path], text: str, kill: Kill) -> None:
    kills, resumed = kill(make_checkpoint(), 6, **AUTOROUND, calib=text)
    assert kills >= 8
    assert resumed >= 4


def test_converted_while_downloaded(make_checkpoint: Callable[..., Path], hub: Hub, kill: Kill) -> None:
    hub.add_folder("user/model", make_checkpoint("smollm2", shards=4))
    kills, resumed = kill("user/model", 8, stream=True, max_shard_bytes=30_000)
    assert kills >= 8
    assert resumed >= 5


def test_bits_for_a_size(make_checkpoint: Callable[..., Path], text: str, kill: Kill) -> None:
    """Nothing of it is kept; and the report and its page are of the artifact, or are not there."""
    kills, _ = kill(make_checkpoint(), 2, **TARGET, calib=text)
    assert kills == 8


def test_bits_for_a_size_by_autoround(make_checkpoint: Callable[..., Path], text: str, kill: Kill) -> None:
    """The same bits are chosen each time, so that finished blocks are those of this choice."""
    kills, resumed = kill(make_checkpoint(), 2, **AUTOROUND, **TARGET, calib=text)
    assert kills >= 2
    assert resumed >= 1
