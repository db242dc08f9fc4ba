"""Failures on the way to the Hub: which of them pass by themselves, and the next step after those that do not.

Status codes and their meaning are the Hub's (huggingface_hub, `utils/_http.py`, `hf_raise_for_status`): 401 for a
repository that is private or does not exist, `GatedRepo` in X-Error-Code for one whose licence must be accepted first.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import re
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from exl_cli.errors import brief, param
from exl_cli.models.hub.names import Repository

if TYPE_CHECKING:
    from exl_cli.models.hub.client import Hub

# Failures in a row, without a byte of progress, after which to give up; the wait doubles after each of them. A longer
# Retry-After than the last is not obeyed: give up and say so.
_TRIES = 5
_LONGEST_WAIT, _LONGEST_ASKED = 30.0, 600.0
_PASSING = {
    408: "timed out",
    429: "is rate-limiting requests",
    500: "returned an error",
    502: "returned an error",
    503: "is busy",
    504: "timed out",
}

_GOES_ON = "run the same command to resume"
_HERE = "exl list shows the downloaded models"


class BrokenTransferError(Exception):
    """A transfer that ended early or whose content is wrong, though the connection did not fail."""


class Patience:
    """Counts the failures in a row of one task, notes each of them, and waits after it."""

    def __init__(self, task: str, note: Callable[[str], object], wait: Callable[[float], None]) -> None:
        self._task, self._note, self._wait = task, note, wait
        self._failures = self._furthest = 0

    def reached(self, size: int) -> None:
        """Count from zero again if so many bytes are more than ever before.

        A server that resends the same bytes and breaks off gets no more tries.
        """
        if size > self._furthest:
            self._furthest, self._failures = size, 0

    def failed(self, error: Exception, *, reconnect: bool = True) -> None:
        """Wait before the next try, or raise `error` if it will not pass or has come too often.

        With `reconnect`, try again also where no connection could be made at all.
        """
        reason, asked = _passing(error, reconnect), asked_wait(error)
        self._failures += 1
        if not reason or self._failures > _TRIES or asked > _LONGEST_ASKED:
            raise error
        seconds = max(min(2.0 ** (self._failures - 1), _LONGEST_WAIT), asked)
        self._note(f"{self._task}: {reason}; retrying in {seconds:g} s")
        self._wait(seconds)


def _passing(error: Exception, reconnect: bool) -> str:
    """Why `error` may pass by itself, in a few words; empty where it will not."""
    http = http_library()
    if isinstance(error, BrokenTransferError):
        return str(error)
    if (status := status_of(error)) in _PASSING:
        return f"the Hub {_PASSING[status]} ({status})"
    if isinstance(error, http.TimeoutException):
        return "timed out"
    if isinstance(error, (http.ConnectError, http.ProxyError)):
        return f"connection failed ({_reason(error)})" if reconnect else ""
    passes = isinstance(error, http.TransportError) and not _is_wrong_address(error)
    return "connection lost" if passes else ""


def _is_wrong_address(error: Exception) -> bool:
    """Whether a server sent us to where no HTTP goes, as to file:// or to no address at all."""
    return isinstance(error, http_library().UnsupportedProtocol) or "location header" in str(error)


def asked_wait(error: Exception) -> float:
    """Seconds that the server asks to wait: its Retry-After, as a number or as a date; 0 where it does not."""
    text = _header(error, "retry-after").strip()
    if re.fullmatch(r"[0-9]+", text):
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # neither, or no date of any calendar
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def http_library() -> ModuleType:
    """The HTTP library that this huggingface_hub uses: httpx before its 2.0, httpx2 since."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def status_of(error: Exception) -> int:
    """The HTTP status that the server answered with; 0 where it did not."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _header(error: Exception, name: str) -> str:
    return getattr(getattr(error, "response", None), "headers", {}).get(name) or ""


def _reason(error: BaseException) -> str:
    """The innermost cause that says anything: the outer ones only repeat that something failed."""
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    cause = None if isinstance(error, BrokenTransferError) else inner
    return (_reason(cause) if cause is not None else "") or str(error).strip().partition("\n")[0]


def explain(error: Exception, repository: Repository, hub: Hub) -> tuple[str, str]:
    """What a person should read about a failure that did not pass: message and hint."""
    from huggingface_hub import errors

    http = http_library()
    page, log_in = f"{hub.endpoint}/{repository.id}", f"log in with hf auth login, or pass {param('token')}"
    names: list[str] = []
    if isinstance(error, errors.GatedRepoError):
        then = "then wait for its owner's approval" if hub.logged_in else f"then {log_in}"
        return f"{repository.id} is gated", f"accept its licence at {page}, {then}"
    if isinstance(error, errors.RevisionNotFoundError):
        with contextlib.suppress(Exception):
            names = [name for name, _ in hub.branches(repository)]
        listed = f"its branches: {', '.join(names)}" if names else f"see {page}/tree/main"
        return f"{repository.id} has no branch, tag or commit named {repository.revision!r}", listed
    if isinstance(error, errors.RepositoryNotFoundError):
        with contextlib.suppress(Exception):
            names = hub.near(repository)
        check = f"similar names: {', '.join(names)}" if names else "check the name"
        if not names and not hub.logged_in:
            check += f"; if it is private, {log_in}"
        return f"the Hub has no model {repository.id}, or it is private", check
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of {repository} is no longer on the Hub", "run the command again"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be downloaded", f"unset it; {_HERE}"
    if isinstance(error, http.ConnectError | http.ProxyError | http.TimeoutException):
        reason = "timed out" if isinstance(error, http.TimeoutException) else _reason(error)
        return f"cannot reach {hub.endpoint}: {reason}", f"check the network; {_HERE}"
    if status := status_of(error):
        return _by_status(error, status, repository, page, log_in)
    if isinstance(error, (http.TransportError, BrokenTransferError)) and not _is_wrong_address(error):
        return f"downloading {repository} failed: {_reason(error)}", _GOES_ON
    if isinstance(error, (ValueError, KeyError, TypeError, RecursionError, http.HTTPError, http.InvalidURL)):
        return f"{hub.endpoint} does not behave like the Hub: {_reason(error)}", "check HF_ENDPOINT and proxies"
    reason = _reason(error) or type(error).__name__
    return f"downloading {repository} failed: {reason}", f"run again with {param('debug')} for details"


def _by_status(error: Exception, status: int, repository: Repository, page: str, log_in: str) -> tuple[str, str]:
    said = brief(_header(error, "x-error-message"), 400)
    said = f": {said}" if said else ""
    if status == 401:
        return f"the Hub rejects the token{said}", log_in
    if status == 403:
        return f"the Hub denies access to {repository.id}{said}", f"see {page}; {log_in}"
    if status == 429:
        asked = asked_wait(error)
        when = f"in {asked:.0f} s" if 0 < asked < float("inf") else "later"
        return (
            "the Hub is rate-limiting requests (429)",
            f"try again {when}; logging in with hf auth login raises the limit",
        )
    if status >= 500:
        return f"the Hub returned an error ({status})", f"try again later; {_GOES_ON}"
    return f"the Hub refused {repository} ({status}){said}", f"see {page}"
