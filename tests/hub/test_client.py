"""What becomes of the client's errors, warnings and secrets."""

from __future__ import annotations

import errno
import logging
import warnings

import pytest
from hub_stub import Hub

from lbq.formats.errors import DataError, LbqError, RemoteError, StorageError
from lbq.hub.client import clean, explained, told


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), StorageError, "the disk is full (/cache/x)"),
        (caused(RuntimeError("uploading"), OSError(errno.EACCES, "Permission denied", "/x")), StorageError, "/x: Perm"),
        (caused(RuntimeError("uploading"), DataError("a file")), DataError, "a file"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), RemoteError, "reset"),
        (ValueError("Invalid metadata in README.md.\n- license"), RemoteError, "in README.md. - license"),
        (RuntimeError(), RemoteError, "me/tiny: RuntimeError"),
    ],
)
def test_errors_that_no_answer_brought(error: Exception, kind: type[LbqError], says: str) -> None:
    found = explained(error, "me/tiny")
    assert type(found) is kind
    assert says in str(found)
    assert "\n" not in str(found)


def test_nothing_secret_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    said = clean(
        f"PUT https://s3/blob?X-Amz-Signature=abc of 'Bearer {hub.token}'\n with hf_{'a' * 20} and {hub.token!r}"
    )
    assert said == "PUT https://s3/blob of 'Bearer ***' with *** and '***'"


def test_what_the_client_says_becomes_notes(hub: Hub) -> None:
    del hub
    logger = logging.getLogger("huggingface_hub.anything")
    before = logging.getLogger("huggingface_hub").handlers
    notes: list[str] = []
    with told(notes.append):
        logger.warning("Retrying\n%s", "PUT https://s3/blob?signature=abc")
        logger.info("not worth it")
        warnings.warn("space", stacklevel=1)
        warnings.warn("of the client's own", DeprecationWarning, stacklevel=1)
    assert notes == ["Retrying PUT https://s3/blob", "space"]
    assert logging.getLogger("huggingface_hub").handlers == before
