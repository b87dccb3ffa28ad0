"""The benches for a GPU run through without one: nothing in them may run for the first time on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "parts"),
    [
        (
            "gpu_bench.py",
            (
                "Kernels against float64",
                "The whole step",
                "tiny INT4",
                "Depth",
                "Several tokens",
                "Choosing a token",
            ),
        ),
        ("gpu_prefill.py", ("Against float32", "tiny INT4", "Causal attention")),
    ],
)
def test_at_a_toy_size(script: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "bench.md"
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / script), "--toy", "--out", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    text = out.read_text()
    assert text.rstrip().endswith("No faults.")
    for part in parts:
        assert f"## {part}" in text
    assert "Left out" not in text
