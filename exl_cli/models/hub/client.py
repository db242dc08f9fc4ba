"""Every request to the Hub, through huggingface_hub's session, login and errors, each retried while that can help."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from exl_cli.errors import DownloadError, ExlError, UsageError, brief, param
from exl_cli.models.config import with_quantization
from exl_cli.models.hub import failures
from exl_cli.models.hub.failures import BrokenTransferError, Patience
from exl_cli.models.hub.files import ALL_NEEDED, Choice, File, Listing, check_commit, select
from exl_cli.models.hub.names import Repository
from exl_cli.models.hub.xet import Xet
from exl_cli.system.version import installed_version

T = TypeVar("T")
_DEFAULT_ENDPOINT = "https://huggingface.co"
_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LARGEST_SMALL_FILE, _MOST_FILES = 2**24, 100_000


class Hub:
    """A connection to the Hub.

    Args:
        token: None for the one that huggingface_hub is logged in with, if any.
        note: takes a line about each retry.
        endpoint: the Hub's address; None for `HF_ENDPOINT`, else huggingface_hub's own.
        timeout: seconds without a byte before a request counts as failed; None for `HF_HUB_DOWNLOAD_TIMEOUT` or 10.
        wait: called with the seconds to wait before the next try.

    Raises:
        UsageError: a variable of the environment, or the token, cannot be used.
    """

    def __init__(
        self,
        token: str | None = None,
        note: Callable[[str], object] = lambda message: None,
        endpoint: str | None = None,
        timeout: float | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        _check_variables()
        from huggingface_hub import HfApi, constants, get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.endpoint = _check_endpoint(
            endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT or _DEFAULT_ENDPOINT
        )
        self.note, self.wait = note, wait
        self.logged_in = bool(_find_token(token))
        self.timeout: float = timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._reached = False
        library: dict[str, Any] = {"library_name": "exl", "library_version": installed_version()}
        self._api = HfApi(self.endpoint, token=token, **library)
        self._headers = build_hf_headers(token=token, **library)
        self._xet = Xet(self._headers, note)
        # Some of huggingface_hub's calls take no timeout, and its session has none.
        get_session().timeout = self.timeout

    @contextlib.contextmanager
    def explained(self, repository: Repository) -> Iterator[None]:
        """Turn what a request raises into an error that says the next step."""
        try:
            yield
        except ExlError:
            raise
        except Exception as error:
            raise DownloadError(*failures.explain(error, repository, self)) from error

    def listing(self, repository: Repository, choice: Choice = ALL_NEEDED, commit: str | None = None) -> Listing:
        """The files of a repository's revision, or of another commit.

        A mirror may list neither hashes nor sizes, but serve files with the Hub's headers: they say it of the
        chosen files.

        Raises:
            ValueError: nothing that the Hub, or git, could hold.
        """

        def ask() -> Any:
            revision = commit or repository.revision
            return self._api.model_info(repository.id, revision=revision, files_metadata=True, timeout=self.timeout)

        with _readable("its list of files"):
            info = self._ask(str(repository), ask)
            if len(info.siblings or ()) > _MOST_FILES:
                raise ValueError(f"{repository} of {len(info.siblings):,} files")
            listing = Listing(repository, info.sha, tuple(map(_file, info.siblings or ())), _license(info))
        chosen = {file.name for file in select(listing.files, choice)}
        files = (self._identified(listing, file) if file.name in chosen else file for file in listing.files)
        return replace(listing, files=tuple(files))

    def branches(self, repository: Repository) -> list[tuple[str, str]]:
        """Names and commits of the branches, main first."""
        with _readable("its list of branches"):
            refs = self._ask(str(repository), lambda: self._api.list_repo_refs(repository.id))
            pairs = [(str(branch.name), check_commit(branch.target_commit)) for branch in refs.branches]
        return sorted(pairs, key=lambda branch: (branch[0] != "main", _natural(branch[0])))

    def near(self, repository: Repository) -> list[str]:
        """Repositories with similar names, the nearest first."""
        first_word = re.split(r"[-_.]", repository.name)[0]
        searches = ({"search": repository.name}, {"author": repository.owner}, {"search": first_word})
        ids = [str(model.id) for search in searches for model in self._api.list_models(**search, limit=100)]
        return difflib.get_close_matches(repository.id, dict.fromkeys(ids), 3, 0.6)

    def _identified(self, listing: Listing, file: File) -> File:
        """The file with the hash and size that its own address gives, where the listing has no hash."""
        if file.identity:
            return file
        try:
            metadata = self._ask(file.name, lambda: self._metadata(listing, file))
        except Exception as error:
            if failures.status_of(error) in (405, 501):  # a server that answers no HEAD
                return file
            raise
        file = replace(file, size=file.size or metadata.size or 0)
        # An ETag is the SHA-256 of a file in LFS and git's id of any other (huggingface_hub, `hf_hub_url`).
        etag = str(metadata.etag or "").lower()
        with contextlib.suppress(ValueError):  # some other server's ETag
            return replace(file, blob_id=etag) if len(etag) == 40 else replace(file, sha256=etag)
        return file

    def read_config(self, listing: Listing) -> dict[str, Any]:
        """config.json of a revision, with its quantization; {} where it has none. DownloadError if it is no object."""
        config = self._read_json(listing, "config.json")
        return with_quantization(config, lambda: self._read_json(listing, "quantize_config.json")) if config else {}

    def _read_json(self, listing: Listing, name: str) -> dict[str, Any]:
        listed = next((file for file in listing.files if file.name == name), None)
        if listed is None:
            return {}
        file = self._identified(listing, listed)

        def ask() -> bytes:
            content = b""
            with contextlib.closing(self.chunks(listing, file, 0)) as chunks:
                while len(content) <= file.size and (chunk := next(chunks, b"")):
                    content += chunk
            if len(content) != file.size or not file.is_right(file.digest(content)):
                raise BrokenTransferError(f"{name} was corrupted in transit")
            return content

        value, content = None, self._ask(name, ask) if file.size <= _LARGEST_SMALL_FILE else b""
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(content)
        if not isinstance(value, dict):
            raise DownloadError(f"{name} of {listing.repository} is not a JSON object", "do not use this revision")
        return value

    def chunks(self, listing: Listing, file: File, offset: int) -> Generator[bytes, None, None]:
        """The bytes of a file, from `offset` on, as they come; close it to end the request."""
        from huggingface_hub import get_session, hf_raise_for_status

        # Only large files are in xet storage, and asking costs a request.
        source = self._metadata(listing, file).xet_file_data if self._xet.usable and file.sha256 else None
        # The token goes along to where access is renewed: to the Hub, and nowhere else.
        if source is not None and source.refresh_route.startswith(f"{self.endpoint}/"):
            yield from self._xet.chunks(source, file.size, offset)
            return
        # Compressed, a small file would have neither a length nor meaningful ranges.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        url = self._url(listing, file)
        with get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.is_redirect or response.status_code not in (200, 206):
                raise ValueError(f"HTTP {response.status_code} for {file.name}, without content")
            self._reached = True
            sent = response.headers.get("Content-Range") or "nothing"
            if response.status_code == 206 and not sent.startswith(f"bytes {offset}-"):
                raise BrokenTransferError(f"the server sends {brief(sent)} instead of bytes {offset}-")
            skip = offset if response.status_code == 200 else 0
            if skip:
                self.note(f"{file.name}: the server cannot resume; starting over")
            for chunk in response.iter_bytes():
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def _metadata(self, listing: Listing, file: File) -> Any:
        """huggingface_hub's `HfFileMetadata`, from the headers of the file's own address."""
        from huggingface_hub import get_hf_file_metadata

        url = self._url(listing, file)
        return get_hf_file_metadata(url, headers=self._headers, endpoint=self.endpoint, timeout=self.timeout)

    def _url(self, listing: Listing, file: File) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(listing.repository.id, file.name, revision=listing.commit, endpoint=self.endpoint))

    def close(self) -> None:
        """Stop transfers still under way."""
        self._xet.close()

    def _ask(self, task: str, call: Callable[[], T]) -> T:
        patience = Patience(task, self.note, self.wait)
        while True:
            try:
                answer = call()
            except Exception as error:
                # Where nothing was ever reached there is no network, which waiting does not mend.
                patience.failed(error, reconnect=self._reached)
            else:
                self._reached = True
                return answer


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what an answer of another shape than the Hub's raises into a ValueError."""
    try:
        yield
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        raise ValueError(f"cannot read {name}: {error}") from None


def _file(entry: Any) -> File:
    blob_id, sha256 = str(entry.blob_id or "").lower(), ""
    if entry.lfs:
        # Of an LFS file, git's id is that of the pointer.
        sha256 = str(entry.lfs.sha256 or "").lower()
        blob_id = blob_id if sha256 else ""
    size = entry.lfs.size if entry.lfs else entry.size
    return File(entry.rfilename, 0 if size is None else size, blob_id, sha256)


def _license(info: Any) -> str:
    card = getattr(info, "card_data", None)
    value = card.get("license_name") or card.get("license") if card and hasattr(card, "get") else None
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key under which 4.0bpw comes before 10.0bpw."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


# --- the user's settings that huggingface_hub and its HTTP library read, refused by name before they fail -------------


def _check_variables() -> None:
    """Check those without which huggingface_hub cannot be imported, or a connection be opened; UsageError names one."""
    for name in _SECONDS:
        try:
            int(os.environ.get(name, "0"))
        except ValueError:
            wrong = f"{name} is {os.environ[name]!r}, not a whole number of seconds"
            raise UsageError(wrong, "correct or unset it") from None
    for name, is_kind in (("SSL_CERT_FILE", Path.is_file), ("SSL_CERT_DIR", Path.is_dir)):
        path = os.environ.get(name)
        if path and not (is_kind(Path(path)) and os.access(path, os.R_OK)):
            raise UsageError(f"{name} names an unreadable file, {path!r}", "correct or unset it")
    # huggingface_hub keeps the one that it was imported with.
    if endpoint := os.environ.get("HF_ENDPOINT"):
        _check_endpoint(endpoint)


def _check_endpoint(endpoint: str) -> str:
    """The Hub's address, without a slash at its end; UsageError if it is none."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return endpoint.rstrip("/")
    hint = f"write it as {_DEFAULT_ENDPOINT}, or unset it"
    raise UsageError(f"HF_ENDPOINT is {endpoint!r}, not a URL", hint)


def _find_token(given: str | None) -> str | None:
    """The token to send: the one given, else the one that huggingface_hub is logged in with.

    Raises:
        UsageError: no request could carry it, or it cannot be read. The message never shows it.
    """
    from huggingface_hub import constants, get_token

    stored = f"the token in {constants.HF_TOKEN_PATH}"
    try:
        token = given or get_token()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {stored}: {reason}", "check HF_HOME and HF_TOKEN_PATH") from error
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        where = param("token") if given else next((name for name in _TOKENS if os.environ.get(name)), stored)
        raise UsageError(f"{where} contains characters that no token has", "copy it again, without spaces or newlines")
    return token
