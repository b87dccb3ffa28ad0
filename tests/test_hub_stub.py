"""The stub of the Hub's protocol, as the client sees it that everybody uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_stub import TOKEN, Hub, sha256
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = pytest.mark.usefixtures("no_waiting")

NAME = "user/model"
WEIGHTS = bytes(range(256)) * 400
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "deep/notes.txt": b"n"}


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.token == TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def read(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_snapshot(hub: Hub) -> None:
    oid = hub.add(NAME, FILES)
    hub.page_size = 2
    folder = snapshot_download(NAME)
    assert Path(folder).name == oid
    assert read(folder) == FILES
    assert hub.fetched() == sorted(FILES)
    hub.requests.clear()
    assert read(snapshot_download(NAME)) == FILES
    assert hub.fetched() == []


def test_a_revision_is_pinned(hub: Hub) -> None:
    first = hub.add(NAME, FILES)
    hub.put(NAME, "config.json", b"[]")
    assert Path(hf_hub_download(NAME, "config.json", revision=first)).read_bytes() == b"{}"
    assert Path(hf_hub_download(NAME, "config.json")).read_bytes() == b"[]"


def test_a_cut_download_goes_on_where_it_was_cut(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # only whole chunks are kept
    hub.add(NAME, FILES)
    hub.cut("GET", "/blob/")
    assert Path(hf_hub_download(NAME, "model.safetensors")).read_bytes() == WEIGHTS
    cut, rest = hub.asked("GET", "/blob/")
    assert "range" not in cut.headers
    assert rest.headers["range"] == f"bytes={len(WEIGHTS) // 2}-"


def test_who_may_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/private", FILES, private=True)
    hub.add("user/gated", FILES, gated=True)
    for name, error in (
        ("user/private", HfHubHTTPError),
        ("user/none", HfHubHTTPError),
        ("user/gated", GatedRepoError),
    ):
        with pytest.raises(error):
            snapshot_download(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read(snapshot_download("user/private")) == FILES
    assert read(snapshot_download("user/gated")) == FILES
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("user/none")
    assert hub.asked("GET", "/blob/")
    assert not [r for r in hub.requests if r.storage and "authorization" in r.headers]


def test_what_is_not_there(hub: Hub) -> None:
    hub.add(NAME, FILES)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(NAME, revision="v2")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "none.json")


def test_errors_are_retried_or_raised(hub: Hub, no_waiting: list[float]) -> None:
    hub.add(NAME, FILES)
    hub.fail("GET", "/blob/", 429, retry_after="7")
    assert Path(hf_hub_download(NAME, "model.safetensors")).read_bytes() == WEIGHTS
    assert 8.0 in no_waiting
    hub.fail("GET", "/api/models/", 500, times=100)
    with pytest.raises(HfHubHTTPError, match="500"):
        HfApi().model_info(NAME)


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("part_size", [None, 30_000])
def test_a_commit(hub: Hub, part_size: int | None) -> None:
    hub.part_size = part_size
    api = HfApi()
    api.create_repo(NAME, private=True)
    api.create_repo(NAME, exist_ok=True)
    first = hub.head(NAME)
    api.create_commit(
        NAME,
        [CommitOperationAdd("model.safetensors", WEIGHTS), CommitOperationAdd("README.md", b"---\na: b\n---\n")],
        commit_message="m",
        parent_commit=first,
    )
    assert hub.repos[NAME].private
    assert hub.files(NAME)["model.safetensors"] == WEIGHTS
    assert len(hub.asked("PUT", "/upload/")) == (1 if part_size is None else 4)
    assert {(f.path, f.lfs.sha256) for f in api.list_repo_tree(NAME) if f.lfs} == {
        ("model.safetensors", sha256(WEIGHTS))
    }
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(NAME, [CommitOperationAdd("x", b"x")], commit_message="m", parent_commit=first)
    api.create_commit(NAME, [CommitOperationDelete("README.md")], commit_message="m")
    assert "README.md" not in hub.files(NAME)


@pytest.mark.usefixtures("logged_in")
def test_a_cut_upload_leaves_no_blob(hub: Hub) -> None:
    hub.add(NAME, {})
    hub.cut("PUT", "/upload/", times=100)
    with pytest.raises(Exception, match="uploading"):
        HfApi().create_commit(NAME, [CommitOperationAdd("m.safetensors", WEIGHTS)], commit_message="m")
    assert not hub.blobs
    assert hub.files(NAME) == {}


@pytest.mark.usefixtures("logged_in")
def test_a_pull_request(hub: Hub) -> None:
    head = hub.add(NAME, {"a": b"a"})
    made = HfApi().create_commit(NAME, [CommitOperationAdd("b", b"b")], commit_message="m", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert hub.head(NAME) == head
    assert read(snapshot_download(NAME, revision="refs/pr/1")) == {"a": b"a", "b": b"b"}


def test_a_wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, {})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().create_commit(NAME, [CommitOperationAdd("b", b"b")], commit_message="m")
