"""``huggingface_hub``, with its errors in one line, its warnings as notes, and bounded patience."""

from __future__ import annotations

import errno
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from lbq import __version__
from lbq.formats.errors import LbqError, RemoteError, StorageError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
OnNote = Callable[[str], None]

TIMEOUT = 30.0  # seconds until a question about a repository counts as unanswered
WAITS = (1, 2, 4, 8)  # seconds between attempts
LONGEST_WAIT = 300  # seconds; the Hub counts requests over five minutes
PARTIAL = 206
CHUNK = 1 << 20  # bytes of an answer that are handled at a time
_PASSING = frozenset((408, 429, 500, 502, 503, 504))
_FULL = (errno.ENOSPC, errno.EDQUOT)
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def new_api(name: str) -> HfApi:
    """The client of the Hub that HF_ENDPOINT names. Raises UsageError where it is not installed; ``name`` was asked."""
    try:
        from huggingface_hub import HfApi  # slow to import, and not needed for a folder
    except ModuleNotFoundError:
        raise UsageError(f"{name}: a name on the Hub, which needs a package: pip install huggingface_hub") from None
    return HfApi(library_name="lbq", library_version=__version__)


def quiet(text: str) -> None:
    """Notes that nobody reads."""
    del text


@contextmanager
def told(on_note: OnNote, *, bars: bool = True) -> Iterator[None]:
    """What the client logs and warns of inside becomes notes; its bars are for terminals, and for what takes time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as client_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = client_logging.get_logger("huggingface_hub")
    handlers, logger.handlers = logger.handlers, [_Notes(on_note)]
    shown = bars and sys.stderr is not None and sys.stderr.isatty()
    undecided = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    without_bars = undecided and not shown
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        if without_bars:
            disable_progress_bars()
        try:
            yield
        finally:
            logger.handlers = handlers
            if without_bars:
                enable_progress_bars()
            for warning in raised:
                on_note(clean(str(warning.message)))


class _Notes(logging.Handler):
    def __init__(self, on_note: OnNote) -> None:
        super().__init__(logging.WARNING)
        self._on_note = on_note

    def emit(self, record: logging.LogRecord) -> None:
        self._on_note(clean(record.getMessage()))


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Anything the client raises inside becomes an LbqError that names ``what``, a repository or a file of one."""
    try:
        yield
    except LbqError:
        raise
    except Exception as error:  # the client raises its own, those of its HTTP package, OSError and RuntimeError
        raise explained(error, what) from error


def patiently(call: Callable[[], T], on_note: OnNote) -> T:
    """Call again while the Hub is busy or failing, five times at most; what the last call raises is raised."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            pause = _pause(root_of(error), wait)
            if pause is None:
                raise
            on_note(f"the Hub: {_reason(root_of(error))}; trying again in {pause} s")
            time.sleep(pause)
    return call()


@contextmanager
def open_range(
    api: HfApi, repository: str, name: str, revision: str, start: int, stop: int
) -> Iterator[Iterator[bytes]]:
    """Bytes [start, stop) of a file on the Hub, as they come; whoever reads them stops at what is too much.

    Raises the client's errors, RemoteError for a server that knows no ranges and is asked for one from the middle.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repository, name, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(library_name="lbq", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != PARTIAL and start:
            raise RemoteError(f"{repository}: {name}: the server knows no ranges; look at HF_ENDPOINT")
        yield answer.iter_bytes(CHUNK)


def is_unreachable(error: Exception) -> bool:
    """Whether an error says nothing of the repository: no network, HF_HUB_OFFLINE, or a Hub that fails."""
    return is_offline(error) or is_passing(error)


def is_passing(error: BaseException) -> bool:
    """Whether the same may succeed in a while: a connection that failed, a Hub that is busy or fails."""
    return _is_transport(error) or status_of(error) in _PASSING


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what caused it, came from."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def root_of(error: BaseException) -> BaseException:
    """What lies under the client's "Error while uploading" or "not in the cache": an answer, a connection, a disk."""
    found: BaseException | None = error
    while found is not None:
        wraps = type(found).__name__ == "LocalEntryNotFoundError" and found.__cause__ is not None
        if status_of(found) is not None or _is_transport(found):
            return found
        if isinstance(found, OSError | LbqError) and not wraps:
            return found
        found = found.__cause__ or found.__context__
    return error


def explained(error: Exception, what: str) -> LbqError:
    """The error of lbq's that says what to do about one of the client's."""
    root = root_of(error)
    if isinstance(root, LbqError):
        return root
    if isinstance(root, OSError) and root.errno in _FULL:
        return StorageError(f"{what}: the disk is full ({root.filename or 'the cache'}); free some, or set HF_HOME")
    if isinstance(root, OSError) and root.errno is not None and not isinstance(root, ConnectionError):
        return StorageError(f"{what}: {root.filename or 'the cache'}: {root.strerror}")
    return RemoteError(f"{what}: {_advice(root)}")


def _advice(error: BaseException) -> str:
    kind = type(error).__name__
    by_kind = {
        "GatedRepoError": f"access is restricted: accept its terms on the Hub, then {LOGIN}",
        "DisabledRepoError": "the Hub has disabled this repository",
        "RepositoryNotFoundError": f"no such repository on the Hub; if it is private, {LOGIN}",
        "RevisionNotFoundError": "no such branch, tag or commit",
        "RemoteEntryNotFoundError": "no such file at this revision",
        "EntryNotFoundError": "no such file at this revision",
        "LocalTokenNotFoundError": f"no token: {LOGIN}",
    }
    if kind in by_kind:
        return by_kind[kind]
    if is_offline(error):
        return "not in the cache, and HF_HUB_OFFLINE is set: unset it, or fetch it once"
    status = status_of(error)
    by_status = {
        401: f"the Hub does not accept the token, or needs one: {LOGIN}",
        403: "the token may not do this: take one with write access to this repository",
        412: "somebody else committed meanwhile, and nothing was changed: run again",
        429: "the Hub counts too many requests: wait a few minutes and run again",
    }
    if status in by_status:
        return by_status[status]
    if status is not None and status >= 500:
        return f"the Hub fails ({status}): run again later"
    if status is not None:
        return f"the Hub answers {_reason(error)}"
    if _is_transport(error):
        return f"the Hub cannot be reached ({_reason(error)}): look at the network and HF_ENDPOINT, and run again"
    return _reason(error)


def clean(text: str) -> str:
    """One line without the token and without what signs an address."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = re.sub(r"hf_\w{8,}|(?<=Bearer )[^\s'\"]+", "***", text)
    return " ".join(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text).split())


def _secrets() -> list[str]:
    """The token as it is and as an error may quote it."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # a token that cannot be had cannot be told
        return []
    return [token, repr(token)[1:-1]] if token else []


def _reason(error: BaseException) -> str:
    """The first sentence of what the client says."""
    status = status_of(error)
    if status is not None:
        said = getattr(error, "server_message", None)
        return clean(f"{status} {said or ''}")
    return clean(str(error))[:300] or type(error).__name__


def _pause(error: BaseException, wait: int) -> int | None:
    """Seconds to wait before another attempt; None where there is no point in one."""
    if not (_is_broken_off(error) or status_of(error) in _PASSING):
        return None
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("Retry-After", ""))
    pause = int(asked) if asked.isdecimal() else wait
    return pause if pause <= LONGEST_WAIT else None


def is_offline(error: BaseException) -> bool:
    """HF_HUB_OFFLINE, which the client may say by way of a file that is not in the cache."""
    kinds = {kind.__name__ for cause in (error, error.__cause__) if cause for kind in type(cause).__mro__}
    return "OfflineModeIsEnabled" in kinds


def _is_transport(error: BaseException) -> bool:
    """An error of the client's HTTP package (httpx, httpx2) below the protocol: connections, timeouts, proxies."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _is_broken_off(error: BaseException) -> bool:
    """A connection that stood and broke; one that never stood would not stand a second later."""
    return _is_transport(error) and not any(kind.__name__ == "ConnectError" for kind in type(error).__mro__)
