"""Artifacts appear whole or not at all: killed, interrupted, on a full disk, and with two writers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbq.formats import disk, staging
from lbq.formats.disk import free_bytes, require_space
from lbq.formats.errors import BusyError, DataError, StorageError, UsageError
from lbq.formats.staging import StagedFolder, check_target

HARNESS = Path(__file__).with_name("staging_harness.py")


def manifest(*names: str, note: str = "") -> bytes:
    """As much of a manifest as staging looks at."""
    return json.dumps({"lbq_format": 99, "files": dict.fromkeys(names, 0), "note": note}).encode()


FILES = {"config.json": b"{}", "lbq.json": manifest("config.json")}
OLD = {"lbq.json": manifest(note="old")}


def stage_files(target: Path, files: dict[str, bytes] = FILES, *, overwrite: bool = False) -> None:
    with StagedFolder(target, overwrite=overwrite) as stage:
        for name, content in files.items():
            stage.add_file(name, content)
        stage.commit()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def harness(*arguments: str) -> int:
    done = subprocess.run([sys.executable, HARNESS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind", ["new", "exchange", "renames"])
def test_killed_at_every_write(kind: str, tmp_path: Path) -> None:
    assert harness("kill", kind, str(tmp_path)) > 30


def test_writers_exclude_each_other(tmp_path: Path) -> None:
    assert harness("race", str(tmp_path)) > 0


def test_appears_at_commit(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with StagedFolder(target) as stage:
        written = stage.add_file("lbq.json", b"abc")
        assert written == disk.FileEntry(3, hashlib.sha256(b"abc").hexdigest())
        assert not target.exists()
        stage.path("x").write_bytes(b"x")
        stage.commit()
        assert content(target) == {"lbq.json": b"abc", "x": b"x"}
    assert os.listdir(tmp_path) == ["artifact"]


def raise_inside(target: Path, error: type[BaseException]) -> None:
    with StagedFolder(target) as stage:
        stage.add_file("lbq.json", b"")
        raise error


def commit_a_part(target: Path) -> None:
    with StagedFolder(target) as stage:
        stage.path("x.part").touch()
        stage.commit()


def test_nothing_stays_without_commit(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            raise_inside(tmp_path / "artifact", error)
    with StagedFolder(tmp_path / "artifact") as stage:
        stage.add_file("lbq.json", b"")
    with pytest.raises(AssertionError, match="never finished"):
        commit_a_part(tmp_path / "artifact")
    assert os.listdir(tmp_path) == []


def test_names_stay_inside(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "artifact") as stage:
        for name in ("../x", "/x", "a/b", ".."):
            with pytest.raises(DataError, match="not a plain file name"):
                stage.path(name)


def test_a_stale_staging_folder_and_lock_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".artifact.staging").mkdir()
    (tmp_path / ".artifact.staging" / "half.part").write_bytes(b"x")
    (tmp_path / ".artifact.lock").touch()
    stage_files(tmp_path / "artifact")
    assert os.listdir(tmp_path) == ["artifact"]
    assert content(tmp_path / "artifact") == FILES


def test_the_second_writer_is_told_at_once(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with StagedFolder(target) as first:
        with pytest.raises(BusyError, match=str(target)), StagedFolder(target):
            pass
        first.add_file("lbq.json", b"1")
        first.commit()
    assert content(target) == {"lbq.json": b"1"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_artifacts_only(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    target = tmp_path / "artifact"
    target.mkdir()
    stage_files(target)  # an empty folder is as good as none
    with pytest.raises(StorageError, match="--overwrite"):
        stage_files(target)
    stage_files(target, OLD, overwrite=True)
    assert content(target) == OLD
    (target / "lbq.json").rename(target / "precious")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="not an lbq artifact"):
            stage_files(target, overwrite=overwrite)
    assert content(target) == {"precious": OLD["lbq.json"]}
    assert os.listdir(tmp_path) == ["artifact"]


def test_overwrite_keeps_what_lbq_did_not_write(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    stage_files(target)
    (target / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"holds 'notes\.txt', which lbq did not write"):
        stage_files(target, overwrite=True)
    assert content(target) == FILES | {"notes.txt": b"mine"}
    (target / "notes.txt").unlink()
    (target / "lbq.json").write_bytes(b"{")
    with pytest.raises(StorageError, match=r"artifact: cannot tell which files are lbq's: .*lbq\.json"):
        stage_files(target, overwrite=True)
    assert content(target) == FILES | {"lbq.json": b"{"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_appears_during_the_work_is_kept(
    tmp_path: Path, overwrite: bool, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    target = tmp_path / "artifact"

    def convert_beside(new: dict[str, bytes]) -> None:
        with StagedFolder(target, overwrite=overwrite) as stage:
            stage.add_file("lbq.json", FILES["lbq.json"])
            target.mkdir()
            for name, data in new.items():
                (target / name).write_bytes(data)
            stage.commit()

    with pytest.raises(StorageError, match="not empty and not an lbq artifact"):
        convert_beside({"precious": b"mine"})
    assert content(target) == {"precious": b"mine"}
    assert os.listdir(tmp_path) == ["artifact"]


def test_what_appears_at_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even between the check and the rename."""
    target = tmp_path / "artifact"

    def look_and_then_write(*args: Any, **options: Any) -> Path:
        real = check_target(*args, **options)
        (target / "precious").write_bytes(b"mine")
        return real

    target.mkdir()
    with StagedFolder(target) as stage:
        stage.add_file("lbq.json", b"")
        monkeypatch.setattr(staging, "check_target", look_and_then_write)
        with pytest.raises(StorageError, match="not empty"):
            stage.commit()
    assert content(target) == {"precious": b"mine"}
    assert os.listdir(tmp_path) == ["artifact"]


def test_a_mount_point_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be renamed onto it."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(StorageError, match="mount point; choose a folder inside it"):
        check_target(tmp_path / "volume")
    with pytest.raises(StorageError, match="mount point"), StagedFolder(tmp_path / "volume"):
        pass
    stage_files(tmp_path / "volume" / "artifact")
    assert os.listdir(tmp_path) == ["volume"]


def test_an_old_artifact_without_successor_is_put_back(tmp_path: Path) -> None:
    """What a kill between the two renames leaves; a run that may not overwrite must see it, too."""
    stage_files(tmp_path / "artifact")
    (tmp_path / "artifact").rename(tmp_path / ".artifact.old")
    with pytest.raises(StorageError, match="--overwrite"):
        stage_files(tmp_path / "artifact")
    assert content(tmp_path / "artifact") == FILES
    assert os.listdir(tmp_path) == ["artifact"]


def test_output_and_input_must_be_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for target in (source, source / "out", tmp_path / "link", tmp_path / "link" / "out", Path("model"), tmp_path):
        with pytest.raises(UsageError, match="contain one another"):
            check_target(target, source)
        with pytest.raises(UsageError), StagedFolder(target, source=source):
            pass
    assert check_target(Path("model-int4"), source) == tmp_path / "model-int4"
    assert sorted(os.listdir(tmp_path)) == ["link", "model"]
    assert os.listdir(source) == []


def test_unusable_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in ("file", "file/out", "missing/out", "x" * 300, "x" * 250, "loop"):
        with pytest.raises(StorageError), StagedFolder(tmp_path / target):
            pass
    with pytest.raises(UsageError):
        check_target(Path("/"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(StorageError, match="not writable"), StagedFolder(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_links_to_a_target_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "artifact")
    stage_files(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "disk" / "artifact") == FILES


def fail_at(monkeypatch: pytest.MonkeyPatch, point: int, error: BaseException) -> Callable[[], bool]:
    """Let the ``point``-th call that changes files raise ``error``; tells whether it was reached."""
    seen = 0

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == point:
                raise error
            return call(*args, **kwargs)

        return wrapped

    for name in ("pwrite", "fsync", "rename", "mkdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(staging, "exchange", wrap(staging.exchange))
    return lambda: seen >= point


@pytest.mark.parametrize("old", [None, OLD])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_every_point(
    tmp_path: Path, old: dict[str, bytes] | None, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, told = 0, None
    while True:
        points += 1
        parent = tmp_path / str(points)
        parent.mkdir()
        target = parent / "artifact"
        if old:
            stage_files(target, old)
        with monkeypatch.context() as patch:
            reached = fail_at(patch, points, error)
            try:
                stage_files(target, overwrite=True)
            except (StorageError, KeyboardInterrupt) as caught:
                told = caught
            if not reached():
                break
        if isinstance(error, OSError):
            assert str(parent) in str(told)
            assert "bytes free); free some space" in str(told)
        else:
            assert told is error
        assert (content(target) if target.exists() else None) in (old, FILES)
        assert set(os.listdir(parent)) <= {"artifact"}
        stage_files(target, overwrite=True)
        assert content(target) == FILES
    assert points > 9


def test_space_is_required_before_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    free = free_bytes(tmp_path)
    assert free > 0
    with pytest.raises(StorageError, match=rf"{tmp_path}.*{1 << 62} bytes needed, \d+ bytes free"):
        require_space(tmp_path / "not" / "yet", 1 << 62)


def test_files_are_hashed_whole(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert disk.hash_file(tmp_path / "x") == disk.FileEntry(len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(StorageError, match="missing"):
        disk.hash_file(tmp_path / "missing")
