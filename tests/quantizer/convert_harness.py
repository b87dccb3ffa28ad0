"""Run by tests in a process of its own, because it forks and kills.

    convert_harness.py SOURCE FOLDER [convert|import|export]    kill such work at every system call that changes files

Prints the number of points that were tried.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from lbq.conversion import convert
from lbq.quantizer.export import export
from lbq.quantizer.foreign.importing import import_checkpoint


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


staging = load(Path(__file__).parents[1] / "formats" / "staging_harness.py")


WORK: dict[str, Callable[[Path, Path], object]] = {
    "convert": lambda source, out: convert(source, out, bits=4, group=32, max_shard_bytes=40_000, device="cpu"),
    "import": lambda source, out: import_checkpoint(source, out),
    "export": lambda source, out: export(source, "vllm", out),
}


def kill_everywhere(source: Path, folder: Path, work: Callable[[Path, Path], object]) -> int:
    target = folder / "artifact"
    work(source, target)
    whole = staging.state(target)
    before = staging.state(source)
    for point in range(1, 1000):
        shutil.rmtree(target, ignore_errors=True)

        def killed(point: int = point) -> None:
            staging.Points(point).install()
            work(source, target)

        status = staging.in_child(killed)
        after = staging.state(target)
        assert after in (None, whole), f"point {point}: half an artifact"
        if status == 0:
            assert after == whole
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"point {point}: status {status}"
        if after is None:
            work(source, target)
            assert staging.state(target) == whole, f"point {point}: the rerun differs"
            assert staging.litter(folder) == [], f"point {point}: litter"
        else:
            staging.recover(target)
            assert staging.litter(folder) == []
        assert staging.state(source) == before, "the source was touched"
    return point


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what the kernel has survives a kill
    kind = sys.argv[3] if len(sys.argv) > 3 else "convert"
    print(kill_everywhere(Path(sys.argv[1]), Path(sys.argv[2]), WORK[kind]))
