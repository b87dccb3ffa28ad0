"""The GPU tests of the kernels, on a CPU: Triton's interpreter has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    [f"kernels/test_{name}.py" for name in ("gemv", "dequant", "dense", "cuda_linear", "planes", "project", "batch")],
    ["kernels/test_attention.py", "kernels/test_sample.py", "test_fused.py"],
    ["kernels/test_prompt.py", "test_prompts.py"],
    ["test_fused_batch.py"],
    ["test_explain.py", "bench/test_decode.py", "bench/test_profile.py"],
]


@pytest.mark.parametrize("names", FILES, ids=["products", "steps", "prompts", "texts", "bench"])
def test_under_the_interpreter(names: list[str]) -> None:
    folder = HERE.parent
    files = [str(folder / name) for name in names]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"--confcutdir={folder}",
            *files,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
