"""The bench of prompts runs through without a GPU: nothing in it may run for the first time on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_prefill.py"


@pytest.mark.slow
def test_at_a_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "bench.md"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--toy", "--out", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    text = out.read_text()
    assert text.rstrip().endswith("No faults.")
    for part in ("Against float32", "tiny INT4", "Causal attention"):
        assert f"## {part}" in text
    assert "Left out" not in text
