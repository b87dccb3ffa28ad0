"""The GPU tests of the kernels, on a CPU: Triton's interpreter has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = ("gemv", "dequant", "dense", "cuda_linear", "planes", "project", "attention", "sample")
FILES = (*(f"kernels/test_{name}.py" for name in KERNELS), "test_fused.py")


def test_under_the_interpreter() -> None:
    folder = HERE.parent
    files = [str(folder / name) for name in FILES]
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
