"""Run in a process of its own, because it forks and kills.

    kill_harness.py SOURCE FOLDER ROUNDS OPTIONS    kill a conversion with OPTIONS (JSON) at a random call that changes
                                                    files, and again while it goes on, MOST times unless it is done
                                                    before, and let it finish; so many rounds

SOURCE is a folder or, where the Hub is in another process, an id. Prints how often it was killed, and how often a later
run found something finished.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


MOST = 4
staging = load(Path(__file__).parents[1] / "formats" / "staging_harness.py")


def finished(folder: Path) -> int:
    """What a killed run has left to go on with: blocks, or files of the source that were used up."""
    journal = folder / ".artifact.stream" / "stream.json"
    blocks = len(list((folder / ".artifact.work").glob("block-*.safetensors")))
    return blocks + (len(json.loads(journal.read_text())["sources"]) if journal.exists() else 0)


def kill_at_random(source: str, folder: Path, rounds: int, options: dict[str, Any]) -> tuple[int, int]:
    target = folder / "artifact"

    def work() -> None:
        convert(source, target, group=32, device="cpu", **options)

    counted = staging.Points(-1)

    def count() -> None:
        counted.install()
        work()
        (folder / "points").write_text(str(counted.seen))

    assert staging.in_child(count) == 0
    points = int((folder / "points").read_text())
    whole, before = staging.state(target), staging.state(Path(source))
    draw, kills, resumed = random.Random(11), 0, 0
    for number in range(rounds):
        shutil.rmtree(target)
        for attempt in range(MOST + 1):
            point = draw.randrange(1, points + 1) if attempt < MOST else 0
            found = finished(folder)

            def killed(point: int = point) -> None:
                staging.Points(point).install()
                work()

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
        assert staging.state(Path(source)) == before, "the source was touched"
    return kills, resumed


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what the kernel has survives a kill
    options = json.loads(sys.argv[4])
    if options.get("method") == "autoround":  # for all children at once; it collects garbage several times a block
        with quiet():
            import auto_round  # noqa: F401
        gc.collect()
        gc.freeze()
    print(*kill_at_random(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), options))
