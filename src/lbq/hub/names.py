"""What a user may call a model: a folder, or ``owner/name@revision`` on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lbq.formats.errors import StorageError, UsageError

MAIN = "main"
_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>.*))?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)  # branches, tags, commits, refs/pr/1
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A model repository at a branch, tag or commit. ``str`` gives ``owner/name``, and ``@revision`` beside main."""

    name: str
    revision: str = MAIN

    def __str__(self) -> str:
        return self.name if self.revision == MAIN else f"{self.name}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which cannot move."""
        return is_commit(self.revision)


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit id."""
    return _COMMIT.fullmatch(revision) is not None


def parse_hub_id(text: str, revision: str | None = None) -> HubId | None:
    """Read ``owner/name`` or ``owner/name@revision``; None for what is neither.

    ``revision`` is one that was given apart. Raises UsageError for a revision that git would not take, or for two.
    """
    found = _ID.fullmatch(text)
    if found is None or "--" in found["name"] or ".." in found["name"] or found["name"].endswith(".git"):
        return None
    asked = found["revision"]
    if asked is not None and revision is not None and asked != revision:
        raise UsageError(f"{text}: --revision {revision} asks for another revision; leave out one of them")
    asked = revision if asked is None else asked
    if asked is None:
        return HubId(found["name"])
    if not _REVISION.fullmatch(asked) or ".." in asked:
        raise UsageError(f"{text}: {asked!r} is not a branch, tag or commit")
    return HubId(found["name"], asked)


def find_model(model: str | Path, revision: str | None = None) -> Path | HubId:
    """``model`` as the folder that it is, else as a Hub id.

    Raises StorageError where it is neither, UsageError for a GGUF file, a revision of a folder or one that git would
    not take.
    """
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"{model}: a folder has no revisions; leave out --revision")
        return path
    if path.suffix == ".gguf" and path.is_file():
        raise UsageError(f"{model}: a GGUF file; lbq import {model} --original MODEL makes an artifact of it")
    if path.exists():
        raise StorageError(f"{model}: not a folder; give the folder that holds config.json")
    hub_id = parse_hub_id(str(model), revision)
    if hub_id is None:
        raise StorageError(f"{model}: no such folder, and not a Hub id (owner/name)")
    return hub_id
