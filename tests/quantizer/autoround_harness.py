"""Run by test_autoround_resume.py in a process of its own, because it forks and kills.

    autoround_harness.py SOURCE TEXT FOLDER ROUNDS    kill a conversion at a random call that changes files, and again
                                                      while it goes on, until it is done; so many times

Prints how often it was killed, and how often a later run found finished blocks.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import torch

from lbq.conversion import convert
from lbq.quantizer.quiet import quiet


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


staging = load(Path(__file__).parents[1] / "formats" / "staging_harness.py")


def work(source: Path, text: Path, target: Path) -> None:
    options = {"iters": 2, "nsamples": 3, "seqlen": 12, "batch_size": 2, "calib": str(text)}
    convert(source, target, method="autoround", group=32, device="cpu", **options)


def kill_at_random(source: Path, text: Path, folder: Path, rounds: int) -> tuple[int, int]:
    target, beside = folder / "artifact", folder / ".artifact.work"
    counted = staging.Points(-1)

    def count() -> None:
        counted.install()
        work(source, text, target)
        (folder / "points").write_text(str(counted.seen))

    assert staging.in_child(count) == 0
    points = int((folder / "points").read_text())
    whole, before = staging.state(target), staging.state(source)
    draw, kills, resumed = random.Random(11), 0, 0
    for number in range(rounds):
        shutil.rmtree(target)
        while True:
            point = draw.randrange(1, points + 1)
            found = len(list(beside.glob("block-*.safetensors"))) if beside.is_dir() else 0

            def killed(point: int = point) -> None:
                staging.Points(point).install()
                work(source, text, target)

            status = staging.in_child(killed)
            resumed += found > 0
            after = staging.state(target)
            assert after in (None, whole), f"round {number}, point {point}: half an artifact, or another"
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, f"round {number}, point {point}: status {status}"
            kills += 1
            if after is not None:  # killed while it tidied up
                shutil.rmtree(target)
        assert after == whole, f"round {number}: the result differs"
        assert staging.litter(folder) == [], f"round {number}: litter"
        assert staging.state(source) == before, "the source was touched"
    return kills, resumed


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what the kernel has survives a kill
    with quiet():
        import auto_round  # noqa: F401
    gc.collect()
    gc.freeze()
    print(*kill_at_random(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
