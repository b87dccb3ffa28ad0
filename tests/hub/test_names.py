"""What is a folder and what is a name on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbq.formats.errors import StorageError, UsageError
from lbq.hub.names import HubId, find_model, parse_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "revision", "found"),
    [
        ("user/name", None, HubId("user/name")),
        ("user/na.me-1_b@v1.0", None, HubId("user/na.me-1_b", "v1.0")),
        ("user/name", "refs/pr/1", HubId("user/name", "refs/pr/1")),
        ("user/name@main", "main", HubId("user/name")),
        (f"user/name@{COMMIT}", None, HubId("user/name", COMMIT)),
        *((text, None, None) for text in ("name", "./user/name", "../name", "/user/name", "a/b/c", "user/", "u/n.git")),
        *((text, None, None) for text in ("user/na--me", "user/na..me", "user/.name", "üser/name", "user/name\n", "")),
    ],
)
def test_hub_ids(text: str, revision: str | None, found: HubId | None) -> None:
    assert parse_hub_id(text, revision) == found
    if found is not None:
        assert found.is_pinned == (found.revision == COMMIT)
        assert str(found) == ("user/name" if found == HubId("user/name") else f"{found.name}@{found.revision}")


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "/a", "a/", "a b", "~1", "^", "a:b", "a\\b", "-a", "é"])
def test_revisions_that_git_would_not_take(revision: str) -> None:
    """The client makes a file of this name in its cache."""
    with pytest.raises(UsageError, match="is not a branch"):
        parse_hub_id(f"user/name@{revision}")
    with pytest.raises(UsageError, match="is not a branch"):
        parse_hub_id("user/name", revision)


def test_two_revisions() -> None:
    with pytest.raises(UsageError, match="another revision"):
        parse_hub_id("user/name@v1", "v2")


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("user/name") == HubId("user/name")
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert find_model("user/name") == Path("user/name")
    with pytest.raises(UsageError, match="no revisions"):
        find_model("user/name", "v1")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="not a folder"):
        find_model("file")
    with pytest.raises(StorageError, match="no such folder, and not a Hub id"):
        find_model("none")
