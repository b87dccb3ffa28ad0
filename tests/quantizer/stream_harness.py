"""Run by test_streaming.py in a process of its own, because it forks and kills.

    stream_harness.py NAME FOLDER    kill a streamed conversion of NAME at many system calls that change files

The Hub is in another process. Prints the number of the last point.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import torch

from lbq.conversion import convert

STRIDE = 17  # of the points that are tried; two threads make them, so that their numbers are not the same every time


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


staging = load(Path(__file__).parents[1] / "formats" / "staging_harness.py")


def work(name: str, target: Path) -> None:
    convert(name, target, bits=4, group=32, max_shard_bytes=30_000, device="cpu", stream=True)


def kill_everywhere(name: str, folder: Path) -> int:
    target = folder / "artifact"
    assert staging.in_child(lambda: work(name, target)) == 0
    whole = staging.state(target)
    assert whole
    for point in range(1, 2000, STRIDE):
        shutil.rmtree(target, ignore_errors=True)

        def killed(point: int = point) -> None:
            staging.Points(point).install()
            work(name, target)

        status = staging.in_child(killed)
        after = staging.state(target)
        assert after in (None, whole), f"point {point}: half an artifact"
        if status == 0:
            assert after == whole
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"point {point}: status {status}"
        if after is None:
            assert staging.in_child(lambda: work(name, target)) == 0, f"point {point}: the rerun fails"
            assert staging.state(target) == whole, f"point {point}: the rerun differs"
            assert staging.litter(folder) == [], f"point {point}: litter"
        else:
            staging.recover(target)
            shutil.rmtree(folder / ".artifact.stream", ignore_errors=True)
    return point


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what the kernel has survives a kill
    print(kill_everywhere(sys.argv[1], Path(sys.argv[2])))
