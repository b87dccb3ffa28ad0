"""What measures starts and loading runs through without a GPU: nothing in it may run for the first time on one."""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """A script, imported, whose command line is ``script.main``."""

    def imported(name, *arguments):
        monkeypatch.syspath_prepend(str(SCRIPTS))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return imported


def test_a_tiny_model_starts(script, tmp_path, capfd):
    options = ("--shape", "tiny", "--device", "cpu", "--workers", 0, "--times", 1)
    script("gpu_start", tmp_path / "tiny", *options).main()
    said = capfd.readouterr().out
    assert len(re.findall(r"ended with 0 after", said)) == 2
    assert re.search(r"\| 0 \| cold \| \d+\.\d\d \|\n\| 0 \| warm \| \d+\.\d\d \|", said)


def test_a_tiny_model_is_loaded(script, tmp_path, capsys, monkeypatch):
    gpu_loading = script("gpu_loading", tmp_path / "tiny", "--shape", "tiny", "--device", "cpu", "--times", 1)
    monkeypatch.setattr(gpu_loading.binding, "mover", None)  # which it changes
    gpu_loading.main()
    said = capsys.readouterr().out
    assert said.count("nan% |") == len([way for way in gpu_loading.WAYS if way.threads == gpu_loading.CORES])
    assert "read" in said.splitlines()[-1]


def test_what_is_watched_on_a_gpu_is_there(script, monkeypatch):
    gpu_start = script("gpu_start")
    watched = []

    class Clock(gpu_start.Clock):
        def watch(self, owner, name, what, *, tell=False):  # noqa: ARG002
            watched.append(getattr(owner, name))

    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    clock = Clock(time.time())
    gpu_start.watch_gpu(clock)
    gpu_start.watch(clock)
    assert len(watched) > 8
