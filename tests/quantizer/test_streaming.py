"""Converting while downloading, from a stub of the Hub on loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import Hub

from lbq.conversion import convert
from lbq.formats.errors import DataError, RemoteError, StorageError, UsageError
from lbq.formats.staging import StagedFolder
from lbq.hub import client, snapshot
from lbq.hub.names import HubId
from lbq.hub.snapshot import Snapshot, open_snapshot
from lbq.quantizer import prepare, remote
from lbq.quantizer.fetching import Fetcher

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")

Lbq = Callable[..., Any]
NAME = "user/model"
SHARDS = 4
FIRST = 16 << 10  # more than any header has, less than any shard
OPTIONS: dict[str, Any] = {"group": 32, "max_shard_bytes": 30_000, "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_request_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", FIRST)


@pytest.fixture
def source(write_checkpoint: Callable[..., Path], tmp_path: Path, hub: Hub) -> Path:
    folder = write_checkpoint(tmp_path / "model", "smollm2", shards=SHARDS)
    hub.add_folder(NAME, folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetched(hub: Hub) -> list[str]:
    """Shards that were asked for after their headers, as often as they were."""
    large = [request for request in hub.requests if request.storage and request.method == "GET"]
    return [r.path.rpartition("/")[2] for r in large if r.headers["range"] != f"bytes=0-{FIRST - 1}"]


def names(source: Path) -> set[str]:
    return {path.name for path in source.glob("*.safetensors")}


def through_the_cache(out: Path) -> dict[str, bytes]:
    """The artifact as it is made from files in the cache."""
    path = convert(NAME, out.with_name("whole"), stream=False, **OPTIONS).path
    found = content(path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    return found


def test_the_same_bytes(source: Path, hub: Hub, out: Path, tmp_path: Path) -> None:
    convert(NAME, out, stream=True, **OPTIONS)
    assert sorted(fetched(hub)) == sorted(names(source))  # each once
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))
    assert os.listdir(out.parent) == ["out"]
    assert content(out) == through_the_cache(out)
    manifest = json.loads((out / "lbq.json").read_text())
    assert names(source) < manifest["source"]["files"].keys()


def test_two_shards_at_a_time(source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, real = [0, 0], Snapshot.download

    def look() -> None:
        """At files of the source, and at the bytes of all weights on the disk."""
        found = [path for folder in (out.parent, tmp_path / "hf-home") for path in folder.rglob("*.safetensors*")]
        sizes = {path.stat().st_ino: path.stat().st_size for path in found}
        most[0] = max(most[0], sum(path.parent.name == "source" for path in found))
        most[1] = max(most[1], sum(sizes.values()))

    def download(self: Snapshot, name: str, path: Path, on_bytes: Callable[[int], None]) -> None:
        look()
        real(self, name, path, on_bytes)
        look()

    def progress(name: str, nbytes: int) -> None:
        del name, nbytes
        look()

    taken: list[str] = []
    take = Fetcher.take

    def slowly(self: Fetcher) -> Any:
        """What is fetched ahead is there before anything is done with this file."""
        found = take(self)
        taken.append(found.path.name)
        if self._ahead is not None:
            self._ahead.join()
        return found

    monkeypatch.setattr(Snapshot, "download", download)
    monkeypatch.setattr(Fetcher, "take", slowly)
    convert(NAME, out, stream=True, on_progress=progress, **OPTIONS)
    assert sorted(taken) == sorted(names(source))
    assert most[0] == 2
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    artifact = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert artifact < most[1] <= 2 * max(shards) + artifact


def test_files_in_the_cache_are_used_and_stay(source: Path, hub: Hub, out: Path) -> None:
    from huggingface_hub import hf_hub_download

    first, second, *rest = sorted(names(source))
    cached = [Path(hf_hub_download(NAME, name)) for name in (first, second)]
    hub.requests.clear()
    convert(NAME, out, stream=True, **OPTIONS)
    assert sorted(fetched(hub)) == rest
    assert all(path.is_file() for path in cached)
    assert content(out) == through_the_cache(out)


def test_a_failure_and_the_same_command_again(source: Path, hub: Hub, out: Path) -> None:
    hub.fail("GET", r"/blob/.*/model-", 500, times=100, skip=SHARDS + 2)  # headers, then two shards
    with pytest.raises(RemoteError, match="what is finished is kept, and the same command goes on with it"):
        convert(NAME, out, stream=True, **OPTIONS)
    assert os.listdir(out.parent) == [".out.stream"]
    done = set(json.loads((out.parent / ".out.stream" / "stream.json").read_text())["sources"])
    assert len(done) == 2
    assert not list((out.parent / ".out.stream" / "source").glob("*.safetensors"))
    hub.heal()
    hub.requests.clear()
    convert(NAME, out, stream=True, **OPTIONS)
    assert sorted(fetched(hub)) == sorted(names(source) - done)
    assert os.listdir(out.parent) == ["out"]
    assert content(out) == through_the_cache(out)


def test_a_cut_file_goes_on(source: Path, hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was cut, while the command runs and in the next one."""
    monkeypatch.setattr(client, "CHUNK", 1 << 10)
    name = max(names(source))
    total = (source / name).stat().st_size
    hub.cut("GET", rf"/blob/.*/{name}", at=0.5, skip=1)  # the first is that of the header
    hub.cut("GET", rf"/blob/.*/{name}", at=0.5, skip=1)
    hub.fail("GET", rf"/blob/.*/{name}", 500, skip=1, times=100)
    with pytest.raises(RemoteError, match="the Hub fails"):
        convert(NAME, out, stream=True, **OPTIONS)
    hub.heal()
    convert(NAME, out, stream=True, **OPTIONS)
    asked = [r.headers["range"] for r in hub.requests if r.storage and r.path.endswith(name)]
    starts = [int(value.removeprefix("bytes=").partition("-")[0]) for value in asked if f"-{FIRST - 1}" not in value]
    assert starts[0] == 0
    assert 0.4 * total < starts[1] < 0.5 * total  # what came in whole chunks
    assert 0.6 * total < starts[2] < 0.75 * total
    assert set(starts[2:]) == {starts[2]}
    assert content(out) == through_the_cache(out)


def test_a_conversion_that_ends_stops_what_is_on_its_way(
    source: Path, hub: Hub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its next block; it does not ask again for what nobody wants."""
    monkeypatch.setattr(client, "CHUNK", 1 << 10)
    opened, name = open_snapshot(HubId(NAME)), max(names(source))
    total, seen = (source / name).stat().st_size, list[int]()

    def stop(here: int) -> None:
        seen.append(here)
        raise RuntimeError("enough")

    asked = len(fetched(hub))
    with pytest.raises(RemoteError, match="enough"):
        opened.download(name, tmp_path / name, stop)
    assert len(seen) == len(fetched(hub)) - asked == 1
    assert (tmp_path / f"{name}.part").stat().st_size == seen[0] < total
    assert not (tmp_path / name).exists()
    assert not out.exists()


@pytest.mark.parametrize("blocks", [[], [b"more than it has" * 100_000]])
def test_a_server_that_sends_nothing_or_too_much(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[bytes]
) -> None:
    name = max(names(source))
    opened = open_snapshot(HubId(NAME))
    monkeypatch.setattr(snapshot, "open_range", lambda *_: nullcontext(blocks))
    with pytest.raises(RemoteError, match=rf"{name}: {len(b''.join(blocks))} bytes came, and \d+ were said"):
        opened.download(name, tmp_path / name, lambda _: None)


def test_where_the_file_system_has_no_links(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after files were moved to where the artifact is made costs the work, and no more."""
    del source
    commit = StagedFolder.commit

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def killed(_: StagedFolder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(StagedFolder, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(NAME, out, stream=True, **OPTIONS)
    assert not list(out.with_name(".out.stream").glob("*.safetensors"))
    monkeypatch.setattr(StagedFolder, "commit", commit)
    convert(NAME, out, stream=True, **OPTIONS)
    assert content(out) == through_the_cache(out)


def test_what_lies_there_and_is_wrong_is_fetched_again(source: Path, hub: Hub, out: Path) -> None:
    hub.fail("GET", r"/blob/.*/model-", 500, times=100, skip=SHARDS + 2)
    with pytest.raises(RemoteError):
        convert(NAME, out, stream=True, **OPTIONS)
    hub.heal()
    work = out.parent / ".out.stream"
    left = names(source) - json.loads((work / "stream.json").read_text())["sources"].keys()
    (work / "source" / f"{min(left)}.part").write_bytes(bytes(20_000))
    (work / "source" / max(left)).write_bytes(b"junk")
    for name in (min(left), max(left)):
        with pytest.raises(RemoteError, match=f"{name}: its content is not what the Hub says"):
            convert(NAME, out, stream=True, **OPTIONS)
    convert(NAME, out, stream=True, **OPTIONS)
    assert content(out) == through_the_cache(out)


def test_content_that_is_not_what_the_hub_says(source: Path, hub: Hub, out: Path) -> None:
    name = max(names(source))
    data = (source / name).read_bytes()
    wrong = data[:-1] + bytes([data[-1] ^ 1])
    oid = next(oid for oid, blob in hub.blobs.items() if blob == data)
    hub.blobs[oid] = wrong
    with pytest.raises(RemoteError, match=f"{name}: its content is not what the Hub says"):
        convert(NAME, out, stream=True, **OPTIONS)
    hub.blobs[oid] = data
    convert(NAME, out, stream=True, **OPTIONS)
    assert content(out) == through_the_cache(out)


def test_another_request_does_not_go_on(source: Path, hub: Hub, out: Path) -> None:
    del source
    hub.fail("GET", r"/blob/.*/model-", 500, times=100, skip=SHARDS + 2)
    with pytest.raises(RemoteError):
        convert(NAME, out, stream=True, **OPTIONS)
    hub.heal()
    with pytest.raises(UsageError, match=r"INT4 in groups of 32, now INT3 in groups of 32.*--restart"):
        convert(NAME, out, stream=True, **{**OPTIONS, "bits": 3})
    with pytest.raises(UsageError, match=r"max shard bytes 30000, now 20000"):
        convert(NAME, out, stream=True, **{**OPTIONS, "max_shard_bytes": 20_000})
    assert convert(NAME, out, stream=True, restart=True, **{**OPTIONS, "bits": 3}).manifest.method.bits == 3
    assert os.listdir(out.parent) == ["out"]


def test_a_removal_that_was_cut(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact stands; what is left is not taken for work to go on with."""
    del source
    rmtree, notes = shutil.rmtree, list[str]()

    def cut(path: Path, **options: Any) -> None:
        if path == out.with_name(".out.stream"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut)
    convert(NAME, out, stream=True, on_note=notes.append, **OPTIONS)
    assert "the artifact is whole" in notes[0]
    left = os.listdir(out.with_name(".out.stream"))
    assert left
    assert "stream.json" not in left
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    convert(NAME, out, stream=True, overwrite=True, on_note=notes.append, **{**OPTIONS, "bits": 3})
    assert len(notes) == 1
    assert os.listdir(out.parent) == ["out"]


def test_from_the_cache_after_a_failure(source: Path, hub: Hub, out: Path) -> None:
    """Work that another conversion leaves as it is is named."""
    del source
    hub.fail("GET", r"/blob/.*/model-", 500, times=100, skip=SHARDS + 2)
    with pytest.raises(RemoteError):
        convert(NAME, out, stream=True, **OPTIONS)
    hub.heal()
    notes: list[str] = []
    convert(NAME, out, stream=False, on_note=notes.append, **OPTIONS)
    assert [".out.stream: unfinished work of another conversion" in note for note in notes] == [True]
    assert sorted(os.listdir(out.parent)) == [".out.stream", "out"]


def test_a_folder_that_is_not_lbqs(source: Path, out: Path) -> None:
    del source
    (out.parent / ".out.stream").mkdir()
    (out.parent / ".out.stream" / "diary.txt").touch()
    for restart in (False, True):
        with pytest.raises(StorageError, match=r"holds 'diary.txt', which lbq did not write"):
            convert(NAME, out, stream=True, restart=restart, **OPTIONS)


def test_a_weight_without_a_code(make_checkpoint: Callable[..., Path], hub: Hub, out: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")

    hub.add_folder(NAME, make_checkpoint("smollm2", edit=spoil, shards=SHARDS))
    with pytest.raises(DataError, match=r"user/model: model.layers.1.mlp.up_proj.weight has nan at \[5, 7\]"):
        convert(NAME, out, stream=True, **OPTIONS)
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("last", [True, False])
def test_a_head_that_differs_at_its_end(
    make_checkpoint: Callable[..., Path], hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """The beginning is compared before anything is fetched, all of it before anything is made of it."""

    def both(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if last:
            tensors["lm_head.weight"][-1, -1] += 1

    monkeypatch.setattr("lbq.quantizer.tensors.CPU_BLOCK", 1 << 10)
    hub.add_folder(NAME, make_checkpoint("smollm2", edit=both, shards=2))
    convert(NAME, out, stream=True, **OPTIONS)
    notes = json.loads((out / "lbq.json").read_text())["notes"]
    assert any("the checkpoint saves another" in note for note in notes) == last
    assert content(out) == through_the_cache(out)


def test_by_itself_where_the_cache_has_no_room(
    source: Path, hub: Hub, out: Path, lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    real = prepare.free_bytes
    monkeypatch.setattr(prepare, "free_bytes", lambda path: need - 1 if "hf-home" in str(path) else real(path))
    done = lbq("convert", NAME, "--gs", "32", "--out", out, "--device", "cpu")
    assert done.code == 0
    assert "note: no room for the source in the cache" in done.err
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))
    hub.requests.clear()
    assert lbq("convert", NAME, "--gs", "32", "--out", out.with_name("other"), "--no-stream").code == 0
    assert list((tmp_path / "hf-home").rglob("*.safetensors"))


def test_no_room_for_what_is_read_more_than_once(
    source: Path, hub: Hub, out: Path, lbq: Lbq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before any weight is fetched, with what there is to do."""
    del source
    real = prepare.free_bytes
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 1000 if "hf-home" in str(path) else real(path))
    text = out.with_name("text.txt")
    text.write_text("all is well " * 1000)
    for name, options in (
        ("--report kl", ("--report", "kl", "--text", text)),
        ("--target-bpw", ("--target-bpw", "5", "--text", text)),
        ("--method autoround", ("--method", "autoround", "--iters", "0")),
    ):
        done = lbq("convert", NAME, "--gs", "32", "--out", out, *options)
        assert (done.code, f"{name} reads it more than once; make room" in done.error) == (4, True), done
    assert fetched(hub) == []
    assert not out.exists()


def test_a_full_disk(source: Path, out: Path, lbq: Lbq, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a file is fetched: the error says how much is needed, and a rerun goes on."""
    real, calls = snapshot.write_at, [0]

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        calls[0] += 1
        if calls[0] > SHARDS - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, data, offset)

    monkeypatch.setattr(snapshot, "write_at", full)
    options = ("--gs", "32", "--max-shard-size", "30KB", "--out", out, "--device", "cpu", "--stream")
    done = lbq("convert", NAME, *options)
    assert done.code == 4
    assert "bytes needed" in done.error
    assert "the same command goes on with it" in done.error
    monkeypatch.setattr(snapshot, "write_at", real)
    assert lbq("convert", NAME, *options).code == 0
    assert content(out) == through_the_cache(out)
    assert source.is_dir()


def test_too_little_room_is_said_before_the_work(
    source: Path, out: Path, lbq: Lbq, monkeypatch: pytest.MonkeyPatch
) -> None:
    del source
    monkeypatch.setattr("lbq.formats.disk.free_bytes", lambda _: 1000)
    done = lbq("convert", NAME, "--gs", "32", "--out", out, "--stream")
    assert (done.code, "disk too full" in done.error) == (4, True)
    assert os.listdir(out.parent) == []


def test_what_does_not_go_together(source: Path, out: Path, lbq: Lbq) -> None:
    for model, options, message in (
        (source, ("--stream",), "--stream has no effect on a folder"),
        (source, ("--restart",), "--restart has no effect"),
        (NAME, ("--stream", "--report", "kl"), "--stream reads the source once, --report kl more than once"),
        (NAME, ("--stream", "--target-bpw", "5"), "--stream reads the source once, --target-bpw more than once"),
        (NAME, ("--stream", "--method", "autoround", "--iters", "0"), "--method autoround more than once"),
        (NAME, ("--stream", "--method", "autoround", "--calib", "no/such"), "--method autoround more than once"),
    ):
        done = lbq("convert", model, "--gs", "32", "--out", out, *options)
        assert (done.code, message in done.error) == (2, True), done
    assert os.listdir(out.parent) == []
