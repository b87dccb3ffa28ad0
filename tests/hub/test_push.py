"""Pushing to a stub of the Hub: one commit or none, whatever fails on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_stub import TOKEN, Hub

from lbq.conversion import convert
from lbq.formats.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")

NAME = "me/tiny-int4"
Lbq = Callable[..., Any]


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def push(hub: Hub, logged_in: None, lbq: Lbq) -> Lbq:
    """``push(artifact, options…)``; whatever comes of it, the token is neither printed nor sent to the storage."""
    del logged_in

    def run(artifact: Path, *options: object) -> Any:
        done = lbq("push", artifact, NAME, *options)
        assert hub.token not in done.out + done.err
        assert not [r for r in hub.requests if r.storage and "authorization" in r.headers]
        return done

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    """What stands on the Hub, but for the card and what the Hub makes."""
    return {
        name: content
        for name, content in hub.files(NAME, revision).items()
        if name not in (".gitattributes", "README.md")
    }


def test_a_new_repository(hub: Hub, push: Lbq, kept_artifact: Path, lbq: Lbq) -> None:
    done = push(kept_artifact, "--private")
    assert done.code == 0, done.err
    assert done.out == f"{hub.url}/{NAME}/commit/{hub.head(NAME)}\n"
    assert hub.repos[NAME].private
    assert published(hub) == files_of(kept_artifact)
    assert b"# tiny-int4" in hub.files(NAME)["README.md"]
    assert len(hub.repos[NAME].commits) == 2  # the Hub's own, and one
    assert hub.repos[NAME].commits[hub.head(NAME)].message.startswith("llama, INT4, by lbq")
    assert lbq("verify", NAME).code == 0


def test_nothing_to_do(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    assert push(kept_artifact).code == 0
    head = hub.head(NAME)
    hub.requests.clear()
    done = push(kept_artifact)
    assert (done.code, done.out) == (
        0,
        f"{NAME}: nothing to do, all {len(files_of(kept_artifact)) + 1} files are there\n",
    )
    assert hub.head(NAME) == head
    assert not [r for r in hub.requests if r.method not in ("GET", "HEAD")]


def test_an_update(hub: Hub, push: Lbq, artifact: Path, checkpoints: dict[str, Path], tmp_path: Path, lbq: Lbq) -> None:
    """Stale shards go in the same commit; what is not lbq's is left alone and named; the author's words stay."""
    assert push(artifact).code == 0
    hub.put(NAME, "notes/mine.txt", b"mine")
    hub.put(NAME, "README.md", hub.files(NAME)["README.md"].replace(b"# tiny-int4", b"# Mine"))
    new = convert(checkpoints["llama"], tmp_path / "new", group=64, device="cpu").path
    before, commits = hub.head(NAME), len(hub.repos[NAME].commits)
    done = push(new, "--message", "Larger groups")
    assert done.code == 0
    assert f"note: {NAME}: not lbq's, and left alone: 'notes/mine.txt'" in done.err
    assert published(hub) == {**files_of(new), "notes/mine.txt": b"mine"}
    assert b"# Mine" in hub.files(NAME)["README.md"]
    assert len(hub.repos[NAME].commits) == commits + 1
    commit = hub.repos[NAME].commits[hub.head(NAME)]
    assert (commit.parent, commit.message) == (before, "Larger groups")
    assert lbq("verify", NAME).code == 0


def test_a_dry_run_changes_nothing(hub: Hub, push: Lbq, kept_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = push(kept_artifact, "--dry-run")
    assert done.code == 0
    assert done.out.startswith(f"{NAME}: would be made\nupload  chat_template.jinja  ")
    monkeypatch.delenv("HF_TOKEN")
    assert json.loads(push(kept_artifact, "--dry-run", "--json").out)["pushed"] is None
    assert not [r for r in hub.requests if r.method not in ("GET", "HEAD")]
    assert NAME not in hub.repos


@pytest.mark.parametrize("part_size", [None, 20_000])
def test_a_cut_upload_goes_on(hub: Hub, push: Lbq, kept_artifact: Path, part_size: int | None) -> None:
    hub.part_size = part_size
    hub.cut("PUT", "/upload/", skip=1, times=99)
    done = push(kept_artifact)
    assert done.code == 6
    assert done.err.splitlines()[-1].startswith(f"lbq: error: {NAME}: the Hub cannot be reached (")
    assert published(hub) == {}
    uploaded = set(hub.blobs)
    assert part_size is not None or len(uploaded) == 1
    hub.heal()
    hub.requests.clear()
    assert push(kept_artifact).code == 0
    assert published(hub) == files_of(kept_artifact)
    assert not [r for r in hub.asked("PUT", "/upload/") if r.path.split("/")[2] in uploaded]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (429, "the Hub counts too many requests: wait a few minutes and run again"),
        (500, "the Hub fails (500): run again later"),
        (401, "the Hub does not accept the token, or needs one: log in"),
        (403, "the token may not do this: take one with write access"),
    ],
)
@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/objects/batch", "/verify/", "/commit/"])
def test_errors_at_every_step(hub: Hub, push: Lbq, kept_artifact: Path, status: int, says: str, where: str) -> None:
    hub.fail("POST", where, status, times=99)
    done = push(kept_artifact)
    assert done.code == 6
    assert done.err.splitlines()[-1].startswith(f"lbq: error: {NAME}: {says}")
    assert NAME not in hub.repos or published(hub) == {}
    hub.heal()
    assert push(kept_artifact).code == 0
    assert published(hub) == files_of(kept_artifact)


@pytest.mark.parametrize("where", ["/api/models/", "/preupload/", "/objects/batch", "/commit/", "/validate-yaml"])
def test_passing_errors_are_waited_for(
    hub: Hub, push: Lbq, kept_artifact: Path, where: str, no_waiting: list[float]
) -> None:
    for method in ("GET", "POST"):
        hub.fail(method, where, 429, retry_after="1")
        hub.fail(method, where, 500)
    done = push(kept_artifact)
    assert done.code == 0, done.err
    assert published(hub) == files_of(kept_artifact)
    assert no_waiting
    assert "note: " in done.err


def test_a_wrong_token(hub: Hub, push: Lbq, kept_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_" + "x" * 30
    done = push(kept_artifact)
    assert (done.code, TOKEN in done.err) == (6, False)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    done = push(kept_artifact)
    assert (done.code, done.error) == (
        6,
        f"{NAME}: no token to push with: log in with `hf auth login` or set HF_TOKEN",
    )
    assert not [r for r in hub.requests if r.method != "GET"]


def test_a_token_from_the_file(hub: Hub, lbq: Lbq, kept_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "hf-home").mkdir()
    (tmp_path / "hf-home" / "token").write_text(hub.token)
    assert lbq("push", kept_artifact, NAME).code == 0


def test_somebody_else_commits_meanwhile(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    hub.add(NAME, {"theirs.txt": b"1"})
    hub.before("POST", "/commit/", lambda: hub.put(NAME, "theirs.txt", b"2"))
    done = push(kept_artifact)
    assert done.code == 6
    assert done.err.splitlines()[-1] == (
        f"lbq: error: {NAME}: somebody else committed meanwhile, and nothing was changed: run again"
    )
    assert hub.files(NAME) == {"theirs.txt": b"2"}
    hub.requests.clear()
    assert push(kept_artifact).code == 0
    assert hub.asked("PUT", "/upload/") == []  # all that is large was there already
    assert published(hub) == {**files_of(kept_artifact), "theirs.txt": b"2"}


def test_a_commit_whose_answer_is_lost(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    hub.lose("POST", "/commit/")
    done = push(kept_artifact)
    assert done.code == 0, done.err
    assert done.out == f"{hub.url}/{NAME}/commit/{hub.head(NAME)}\n"
    assert len(hub.repos[NAME].commits) == 2
    assert published(hub) == files_of(kept_artifact)


def test_an_answer_is_lost_and_somebody_else_commits(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    hub.before("POST", "/commit/", lambda: hub.put(NAME, "lbq.json", b"theirs"))
    hub.fail("POST", "/validate-yaml", 500)  # the first attempt ends here
    hub.before("POST", "/validate-yaml", lambda: hub.put(NAME, "lbq.json", b"theirs"))
    done = push(kept_artifact)
    assert done.code == 6
    assert "somebody else committed meanwhile" in done.err.splitlines()[-1]
    assert hub.files(NAME)["lbq.json"] == b"theirs"


def test_a_pull_request(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    done = push(kept_artifact, "--create-pr")
    assert (done.code, "nothing to open a pull request to" in done.error) == (2, True)
    head = hub.add(NAME, {"theirs.txt": b"1"})
    done = push(kept_artifact, "--create-pr")
    assert (done.code, done.out) == (0, f"{hub.url}/{NAME}/discussions/1\n")
    assert hub.head(NAME) == head
    assert published(hub, "refs/pr/1") == {**files_of(kept_artifact), "theirs.txt": b"1"}
    hub.lose("POST", "/commit/")
    done = push(kept_artifact, "--create-pr")
    assert done.code == 6
    assert f"{NAME}/discussions" in done.err.splitlines()[-1]


def test_a_branch(hub: Hub, push: Lbq, kept_artifact: Path, lbq: Lbq) -> None:
    head = hub.add(NAME, {"theirs.txt": b"1"})
    assert push(kept_artifact, "--revision", "v2").code == 0
    assert hub.head(NAME) == head
    assert published(hub, "v2") == {**files_of(kept_artifact), "theirs.txt": b"1"}
    assert lbq("verify", f"{NAME}@v2").code == 0
    assert b"lbq run me/tiny-int4@v2" in hub.files(NAME, "v2")["README.md"]
    assert push(kept_artifact, "--revision", "v2").out.endswith("files are there\n")
    done = push(kept_artifact, "--revision", head)
    assert (done.code, "cannot be pushed to" in done.error) == (2, True)


def test_a_branch_begins_where_main_was_looked_at(
    hub: Hub, push: Lbq, kept_artifact: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """With main's files, of which those of an earlier artifact go."""
    assert push(kept_artifact).code == 0
    hub.put(NAME, "theirs.txt", b"1")
    main = hub.head(NAME)
    new = convert(checkpoints["llama"], tmp_path / "new", group=64, device="cpu").path
    assert "me/tiny-int4@v2: would be made" in push(new, "--revision", "v2", "--dry-run").out
    hub.before("POST", "/branch/", lambda: hub.put(NAME, "theirs.txt", b"2"))
    assert push(new, "--revision", "v2").code == 0
    assert published(hub, "v2") == {**files_of(new), "theirs.txt": b"1"}
    assert hub.repos[NAME].commits[hub.head(NAME, "v2")].parent == main
    assert published(hub) == {**files_of(kept_artifact), "theirs.txt": b"2"}


def test_a_public_repository_where_a_private_one_is_asked_for(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    hub.add(NAME, {})
    done = push(kept_artifact, "--private")
    assert (done.code, "the repository is public" in done.error) == (2, True)
    assert push(kept_artifact, "--private", "--revision", "v2").code == 2
    hub.repos[NAME].private = True
    assert push(kept_artifact, "--private").code == 0


def test_weights_that_are_not_lbqs(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    """Loaders would take model.safetensors for the weights, and not the artifact's shards."""
    head = hub.add(NAME, {"model.safetensors": b"theirs", "config.json": b"{}"})
    done = push(kept_artifact)
    assert (done.code, "holds 'model.safetensors', not of an lbq artifact" in done.error) == (2, True)
    assert hub.head(NAME) == head
    hub.add(NAME, {"config.json": b"{}"})
    done = push(kept_artifact)
    assert done.code == 0
    assert f"note: {NAME}: replaces 'config.json', not of an lbq artifact" in done.err


def test_a_manifest_that_cannot_be_read(hub: Hub, push: Lbq, kept_artifact: Path) -> None:
    hub.add(NAME, {"lbq.json": b"{", "old.txt": b"1"})
    done = push(kept_artifact)
    assert (done.code, "cannot be read" in done.err) == (0, True)
    assert published(hub) == {**files_of(kept_artifact), "old.txt": b"1"}


def test_a_broken_artifact_is_not_pushed(hub: Hub, push: Lbq, artifact: Path) -> None:
    shard = artifact / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = push(artifact)
    assert (done.code, f"{shard.name}: content differs from its sha256" in done.error) == (3, True)
    shard.unlink()
    assert push(artifact).code == 3
    assert not [r for r in hub.requests if r.method not in ("GET", "HEAD")]
    assert push(artifact / "none").code == 4


def test_a_file_that_changes_meanwhile(hub: Hub, push: Lbq, artifact: Path) -> None:
    shard = artifact / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    hub.before("POST", "/preupload/", lambda: shard.write_bytes(content))
    done = push(artifact)
    assert (done.code, f"{shard.name}: changed while it was pushed" in done.err) == (3, True)
    assert published(hub) == {}


def test_cards_of_folder_and_repository(hub: Hub, push: Lbq, artifact: Path) -> None:
    (artifact / "README.md").write_text("# From the folder\n")
    assert push(artifact).code == 0
    assert b"# From the folder" in hub.files(NAME)["README.md"]
    done = push(artifact)
    assert (done.code, "replaces the repository" in done.err) == (0, False)
    hub.put(NAME, "README.md", b"# Edited on the Hub\n")
    done = push(artifact)
    assert f"note: {NAME}: the folder's README.md replaces the repository's" in done.err
    assert b"# From the folder" in hub.files(NAME)["README.md"]
    (artifact / "README.md").unlink()
    hub.put(NAME, "README.md", b"---\nlicense: [\n---\n")
    done = push(artifact)
    assert (done.code, "are not YAML" in done.err) == (3, True)


def test_the_note_of_a_folder(push: Lbq, artifact: Path) -> None:
    assert "the card names no base_model" in push(artifact, "--dry-run").err
    (artifact / "README.md").write_text("---\nbase_model: someone/base\n---\n")
    assert "base_model" not in push(artifact, "--dry-run").err


def test_push_what_was_pulled(hub: Hub, push: Lbq, kept_artifact: Path, lbq: Lbq, tmp_path: Path) -> None:
    hub.add("someone/tiny", files_of(kept_artifact))
    folder = Path(lbq("pull", "someone/tiny").out.strip())
    assert os.path.islink(folder / "lbq.json")
    assert push(folder).code == 0
    assert published(hub) == files_of(kept_artifact)
    assert lbq("pull", NAME, "--out", tmp_path / "out").code == 0
    assert read_manifest(tmp_path / "out") == read_manifest(kept_artifact)
