"""Run by test_staging.py in a process of its own, because it forks and kills.

    staging_harness.py kill {new,exchange,renames} FOLDER    kill a staged write at every system call that changes files
    staging_harness.py race FOLDER                           several processes write the same target again and again

Prints the number of points or rounds that were tried.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lbq.formats import staging
from lbq.formats.errors import BusyError
from lbq.formats.safetensors_writer import ShardWriter, TensorPlan, index_json, plan_shards, shard_names
from lbq.formats.staging import StagedFolder

State = dict[str, bytes] | None


def write_artifact(target: Path, value: int, *, overwrite: bool = True) -> None:
    """A small artifact with two shards, all of its content depending on ``value``."""
    tensors = {f"t{i}": torch.full((100,), value + i) for i in range(4)}
    shards = plan_shards([TensorPlan(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()], 1600)
    with StagedFolder(target, overwrite=overwrite) as stage:
        stage.add_file("config.json", b"%d" % value)
        files = {"config.json": "", "model.safetensors.index.json": ""}
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            with ShardWriter(stage.path(name), shard) as writer:
                for plan in shard:
                    writer.write(plan.name, tensors[plan.name])
                files[name] = writer.finish().sha256
        stage.add_file("model.safetensors.index.json", index_json(shards))
        stage.add_file("lbq.json", json.dumps({"files": files}).encode())
        stage.commit()


def state(target: Path) -> State:
    return {path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else None


class Points:
    """Counts the calls that change files and kills the process at one of them, or in the middle of a write."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.seen = 0

    def reached(self) -> bool:
        self.seen += 1
        return self.seen == self.kill_at

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.reached():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    def install(self) -> None:
        pwrite = os.pwrite

        def torn(descriptor: int, data: memoryview, offset: int) -> int:
            if self.reached():
                pwrite(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(descriptor, data, offset)

        for name in ("open", "fsync", "rename", "link", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.wrap(getattr(os, name)))
        os.pwrite = self.wrap(torn)
        staging.exchange = self.wrap(staging.exchange)


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a forked process that does ``work``."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_everywhere(kind: str, folder: Path) -> int:
    if kind == "renames":
        staging.exchange = lambda *_: False
    else:
        assert kind == "new" or _can_exchange(folder)
    target = folder / "artifact"
    write_artifact(target, 2)
    new = state(target)
    shutil.rmtree(target)
    if kind != "new":
        write_artifact(target, 1)
    old = state(target)
    shutil.copytree(target, folder / "before") if old else None
    allowed: list[State] = [old, new] + ([None] if kind == "renames" else [])
    seen: list[State] = []
    for point in range(1, 1000):
        shutil.rmtree(target, ignore_errors=True)
        if old:
            shutil.copytree(folder / "before", target)

        def work(point: int = point) -> None:
            Points(point).install()
            write_artifact(target, 2)

        status = in_child(work)
        after = state(target)
        assert after in allowed, f"point {point}: {after}"
        seen.append(after)
        if status == 0:
            assert after == new
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        recover(target)
        assert state(target) in (old, new), f"point {point}: not put back"
        assert litter(folder) == []
        write_artifact(target, 2)
        assert state(target) == new, f"point {point}: the rerun differs"
        assert litter(folder) == []
    assert all(state in seen for state in allowed), "some state was never seen"
    return point


def recover(target: Path) -> None:
    """The next run fails, too, but has cleaned up before."""
    try:
        with StagedFolder(target, overwrite=True):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def _can_exchange(folder: Path) -> bool:
    for name in "ab":
        (folder / name).mkdir()
    return staging.exchange(folder / "a", folder / "b")


def race(folder: Path, writers: int = 4, turns: int = 25) -> int:
    """All writers want the same target at once; a marker shows whether two were ever inside."""
    target = folder / "artifact"

    def turn(number: int) -> bool:
        try:
            with StagedFolder(target, overwrite=True) as stage:
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                stage.add_file("lbq.json", b'{"files": {}, "number": %d}' % number)
                os.unlink(folder / "inside")
                stage.commit()
        except BusyError:
            return False
        return True

    def work() -> None:
        done = 0
        while done < turns:
            done += turn(os.getpid())

    children = []
    for _ in range(writers):
        child = os.fork()
        if child == 0:
            try:
                work()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * writers
    assert litter(folder) == []
    return writers * turns


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what the kernel has survives a kill
    _, command, *arguments = sys.argv
    print(kill_everywhere(arguments[0], Path(arguments[1])) if command == "kill" else race(Path(arguments[0])))
