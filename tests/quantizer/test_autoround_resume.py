"""An AutoRound conversion that is stopped anywhere goes on, with the same bytes; and refuses to go on with others."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.conversion import convert
from lbq.formats.errors import BusyError, DataError, LbqError, StorageError, UsageError
from lbq.formats.staging import StagedFolder
from lbq.quantizer import methods
from lbq.quantizer.autoround.run import Progress
from lbq.quantizer.autoround.work import Work
from lbq.quantizer.convert import Conversion
from lbq.quantizer.quiet import quiet


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """auto-round collects garbage several times a block; not among all that its import has made."""
    with quiet():
        import auto_round  # noqa: F401
    gc.collect()
    gc.freeze()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(3).choices("the quick brown fox", k=2000)))
    return path


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(num_hidden_layers=3)


class StopError(Exception):
    pass


class Tune:
    """A small conversion of ``source`` into ``place/out``, that can be stopped after a number of blocks."""

    def __init__(self, source: Path, text: Path, place: Path) -> None:
        self.source, self.target = source, place / "out"
        self.work = place / ".out.work"
        self.options: dict[str, Any] = {
            "iters": 2, "nsamples": 3, "seqlen": 12, "batch_size": 2, "calib": str(text), "group": 32,
        }  # fmt: skip
        self.told: list[Progress] = []

    def __call__(self, *, stop_after: int | None = None, **options: Any) -> Conversion:
        self.told.clear()

        def tell(progress: Progress) -> None:
            self.told.append(progress)
            if progress.finished == stop_after:
                raise StopError

        chosen = {**self.options, **options}
        return convert(self.source, self.target, method="autoround", device="cpu", on_tuned=tell, **chosen)

    def stop(self, blocks: int) -> None:
        with pytest.raises(StopError):
            self(stop_after=blocks)


@pytest.fixture
def tune(source: Path, text: Path, tmp_path: Path) -> Tune:
    place = tmp_path / "place"
    place.mkdir()
    return Tune(source, text, place)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_goes_on_where_it_stopped(tune: Tune) -> None:
    whole = content(tune().path)
    for path in tune.target.iterdir():
        path.unlink()
    for blocks in (1, 2):
        tune.stop(blocks)
        assert not any(tune.target.iterdir()), "half an artifact"
        assert [path.name for path in tune.target.parent.iterdir() if path.name != "out"] == [".out.work"]
    states = sorted(path.name for path in tune.work.iterdir() if not path.name.startswith("block"))
    assert states == ["quantized-00002.safetensors", "reference-00002.safetensors", "work.json"]
    done = tune()
    assert [progress.finished for progress in tune.told] == [2, 3]
    assert content(done.path) == whole
    assert os.listdir(tune.target.parent) == ["out"]


def test_stopped_after_the_last_block(tune: Tune) -> None:
    tune.stop(3)
    done = tune()
    assert [progress.finished for progress in tune.told] == [3]
    assert len(done.manifest.quantized) == 22


def test_what_does_not_touch_blocks_may_change(tune: Tune) -> None:
    tune.stop(1)
    done = tune(lm_head=16, max_shard_bytes=40_000)
    assert tune.told[0].finished == 1
    assert "lm_head" not in done.manifest.quantized


def _edit_source(tune: Tune) -> None:
    path = tune.source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit_text(tune: Tune) -> None:
    path = Path(tune.options["calib"])
    path.write_text(path.read_text() + ".")


def _edit_tool(tune: Tune) -> None:
    path = tune.work / "work.json"
    path.write_text(re.sub(r'"auto-round": "[^"]+"', '"auto-round": "0.1"', path.read_text()))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_edit_source, {}, "the source's model.safetensors has changed"),
        (_edit_text, {}, r"calibration text \(sha256\) [0-9a-f]{12}…, now [0-9a-f]{12}…"),
        (_edit_tool, {}, r"auto-round 0\.1, now 0\.1"),
        (None, {"iters": 3}, "iterations 2, now 3"),
        (None, {"seed": 1}, "seed 42, now 1"),
        (None, {"batch_size": 3}, "batch 2, now 3"),
        (None, {"nsamples": 2}, "calibration samples 3, now 2"),
        (None, {"seqlen": 10}, "calibration tokens a sample 12, now 10"),
        (None, {"bits": 3}, "INT4 in groups of 32, now INT3 in groups of 32"),
        (None, {"keep": ["layers.2.mlp"]}, r"model\.layers\.2\.mlp\.\w+ INT4 in groups of 32, now BF16"),
    ],
)
def test_refuses_to_go_on(
    change: Callable[[Tune], None] | None, options: dict[str, Any], message: str, tune: Tune
) -> None:
    tune.stop(1)
    if change is not None:
        change(tune)
    before = content(tune.work)
    with pytest.raises(UsageError, match=message) as raised:
        tune(**options)
    assert "drop it with --restart" in str(raised.value)
    assert content(tune.work) == before, "work was lost"
    tune(restart=True, **options)
    assert tune.told[0].finished == 0
    assert os.listdir(tune.target.parent) == ["out"]


def test_refuses_to_go_on_elsewhere(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of GPU need not add up alike."""
    monkeypatch.setattr(methods, "device_name", lambda _: "NVIDIA H200")
    tune.stop(1)
    monkeypatch.setattr(methods, "device_name", lambda _: "NVIDIA A100")
    with pytest.raises(UsageError, match="another conversion: device NVIDIA H200, now NVIDIA A100; repeat"):
        tune()


def test_work_of_an_older_lbq(tune: Tune) -> None:
    tune.stop(1)
    path = tune.work / "work.json"
    header = json.loads(path.read_text())
    del header["device"]
    path.write_text(json.dumps(header | {"work_format": 1}))
    with pytest.raises(UsageError, match="another conversion: work of format 1, this lbq has 2;"):
        tune()


def test_a_removal_that_was_cut(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is not taken for work to go on with, and the artifact stands."""
    rmtree = shutil.rmtree

    def cut(path: Path, **options: Any) -> None:
        if path == tune.work:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut)
    notes: list[str] = []
    whole = content(tune(on_note=notes.append).path)
    assert len(notes) == 1
    assert re.search(r"\.out\.work: Permission denied; the artifact is whole, .* remove it$", notes[0])
    left = os.listdir(tune.work)
    assert left
    assert "work.json" not in left
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    again = tune(overwrite=True, on_note=notes.append)
    assert tune.told[0].finished == 0
    assert content(again.path) == whole
    assert len(notes) == 1
    assert os.listdir(tune.target.parent) == ["out"]


def test_a_conversion_of_another_kind_names_work(tune: Tune, lbq: Callable[..., Any]) -> None:
    tune.stop(1)
    before = content(tune.work)
    done = lbq("convert", tune.source, "--gs", "32", "--out", tune.target)
    assert done.code == 0
    assert re.search(r"note: \S+/\.out\.work: unfinished work of another conversion, \d+ bytes, which this", done.err)
    assert content(tune.work) == before


def test_hidden_states_do_not_stay_in_memory(tmp_path: Path) -> None:
    work = Work(tmp_path / "out")
    work.folder.mkdir()
    states = torch.randn(8, 256, 1024)
    work.write_states("quantized", 3, tuple(states.shape), states.split(2))
    path, found = work.path("quantized", 3), work.states("quantized", 3)
    for read in (lambda: list(found.batches(3)), lambda: [found[number] for number in range(len(found))]):
        assert torch.equal(torch.cat([part.float() for part in read()]), states.bfloat16().float())
        maps = Path("/proc/self/smaps").read_text().partition(str(path))[2]
        assert int(re.search(r"Rss:\s+(\d+) kB", maps)[1]) < 64  # of 4096


def test_two_converters(tune: Tune) -> None:
    tune.stop(1)
    before = content(tune.work)
    with StagedFolder(tune.target), pytest.raises(BusyError, match="another lbq is writing it"):
        tune()
    assert content(tune.work) == before
    tune()


@pytest.mark.parametrize("kind", ["file", "link", "foreign"])
def test_a_work_folder_that_is_not_ours(kind: str, tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    if kind == "file":
        tune.work.write_text("mine")
    elif kind == "link":
        tune.work.symlink_to(tmp_path / "precious")
    else:
        (tmp_path / "precious").rename(tune.work)
    for restart in (False, True):
        with pytest.raises(StorageError, match="move it away"):
            tune(restart=restart)
    assert tune.work.read_text() if kind == "file" else (tune.work / "thesis.txt").read_text()


@pytest.mark.parametrize(
    ("name", "damage", "error"),
    [
        ("work.json", b"{", DataError),
        ("block-00000.safetensors", None, DataError),
        ("block-00000.safetensors", b"1234", DataError),
        ("quantized-00002.safetensors", None, DataError),
        ("reference-00002.safetensors", b"", DataError),
    ],
)
def test_damaged_work(name: str, damage: bytes | None, error: type[LbqError], tune: Tune) -> None:
    tune.stop(2)
    path = tune.work / name
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(error, match=r"\.out\.work"):
        tune()
    assert not tune.target.exists()
    tune(restart=True)


def test_a_full_disk_while_it_works(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how much is needed; what is finished is kept, and the rerun gives the same bytes."""
    whole = content(tune().path)
    for path in tune.target.iterdir():
        path.unlink()
    pwrite, left = os.pwrite, 0

    def counting(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", counting)
    for writes in (0, 30, 60):
        left = writes
        with pytest.raises(
            StorageError, match=r"No space left on device \(\d+ bytes needed, \d+ bytes free\)"
        ) as raised:
            tune()
        assert ("; what is finished is kept, and the same command" in str(raised.value)) == (writes > 0)
    left = 1_000_000
    assert content(tune().path) == whole


def test_a_full_disk_before_it_begins(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbq.formats.disk.free_bytes", lambda _: 1000)
    with pytest.raises(StorageError, match=r"disk too full: \d+ bytes needed, 1000 bytes free"):
        tune()
    assert os.listdir(tune.target.parent) == []


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals(number: str, code: int, tune: Tune) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from lbq import cli\n"
        "from lbq.quantizer.autoround import run\n"
        "tune = run.tune\n"
        "def stop(*arguments):\n"
        "    if os.path.exists('.out.work/block-00000.safetensors'):\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "        time.sleep(60)\n"
        "    return tune(*arguments)\n"
        "run.tune = stop\n"
        "cli.main()\n"
    )
    options = ["--method", "autoround", "--iters", "2", "--nsamples", "3", "--seqlen", "12", "--batch-size", "2"]
    options += ["--calib", tune.options["calib"], "--gs", "32", "--device", "cpu", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", program, "convert", tune.source, *options],
        cwd=tune.target.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "tuning 3 blocks, 0 of them finished before"
    assert re.fullmatch(r"block 1/3: loss \S+ → \S+, \d+ s left", lines[1])
    assert lines[2] == "lbq: what is finished is kept, and the same command goes on with it"
    assert lines[3:] == (["lbq: interrupted"] if number == "SIGINT" else [])
    assert os.listdir(tune.target.parent) == [".out.work"]
    tune()
    assert tune.told[0].finished == 1
