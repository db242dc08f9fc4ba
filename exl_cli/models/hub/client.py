"""Every request to the Hub, through huggingface_hub's session, login and errors, each retried while that can help."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from exl_cli.models.hub import environment, failures, xet
from exl_cli.models.hub.failures import Patience, Retry
from exl_cli.models.hub.names import Repository, check_file_names
from exl_cli.models.hub.store import File
from exl_cli.models.hub.xet import Xet
from exl_cli.system.version import installed_version

T = TypeVar("T")
_LARGEST_SMALL_FILE = 2**24


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        repository: what was asked for.
        commit: the commit that its revision stands for.
        files: all of them.
        license: the model card's licence, or empty.
    """

    repository: Repository
    commit: str
    files: tuple[File, ...]
    license: str = ""


def _ignore(message: str) -> None:
    return None


class Hub:
    """A connection to the Hub.

    Args:
        token: None for the one that huggingface_hub is logged in with, if any.
        note: is told of retries.
        retry: how patient to be.
        endpoint: the Hub's address; None for `HF_ENDPOINT`, else huggingface_hub's own.
        timeout: seconds without a byte before a request counts as failed; None for `HF_HUB_DOWNLOAD_TIMEOUT` or 10.
    """

    def __init__(
        self,
        token: str | None = None,
        note: Callable[[str], None] = _ignore,
        retry: Retry | None = None,
        endpoint: str | None = None,
        timeout: float | None = None,
    ) -> None:
        environment.check_variables()
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.endpoint = environment.check_endpoint(
            endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT or environment.DEFAULT_ENDPOINT
        )
        self.note, self.retry = note, retry or Retry()
        self.logged_in = bool(environment.find_token(token))
        self.timeout: float = timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._token = token
        self._reached = False
        self._headers = build_hf_headers(token=token, library_name="exl", library_version=installed_version())
        self._xet = Xet(self._headers, note) if xet.is_here() else None
        # Some of huggingface_hub's calls take no timeout, and its session has none.
        get_session().timeout = self.timeout

    @contextlib.contextmanager
    def explained(self, repository: Repository) -> Iterator[None]:
        """Turn what a request raises into an error that says the next step."""
        try:
            yield
        except Exception as error:
            raise failures.explain(
                error,
                repository,
                self.endpoint,
                logged_in=self.logged_in,
                near=lambda: self._near(repository),
                branches=lambda: self._branch_names(repository),
            ) from error

    def patience(self, what: str) -> Patience:
        """A counter of failures for a task of that name."""
        return Patience(self.retry, self.note, what)

    def listing(self, repository: Repository) -> Listing:
        """The files of a revision."""
        info = self._ask(
            str(repository),
            lambda: self._api().model_info(
                repository.id, revision=repository.revision, files_metadata=True, timeout=self.timeout
            ),
        )
        files = [_file(entry.rfilename, entry.size, entry.blob_id, entry.lfs) for entry in info.siblings or ()]
        check_file_names((file.name for file in files), repository)
        return Listing(repository, str(info.sha), tuple(files), _license(info))

    def branches(self, repository: Repository) -> list[tuple[str, str]]:
        """Names and commits of the branches, main first."""
        return self._ask(str(repository), lambda: self._branches(repository))

    def tree(self, repository: Repository, commit: str) -> Listing:
        """The files of a commit, without the model card."""

        def ask() -> list[File]:
            entries = self._api().list_repo_tree(repository.id, revision=commit, recursive=True)
            return [_file(e.path, e.size, e.blob_id, e.lfs) for e in entries if hasattr(e, "size")]

        files = self._ask(str(repository), ask)
        check_file_names((file.name for file in files), repository)
        return Listing(repository, commit, tuple(files))

    def read(self, listing: Listing, file: File) -> bytes:
        """A small file's content.

        Raises:
            failures.BrokenTransferError: it is not what the listing says.
        """

        def ask() -> bytes:
            if file.size > _LARGEST_SMALL_FILE:
                raise failures.BrokenTransferError(f"{file.name} has {file.size:,} bytes")
            with self._http(listing, file, 0) as (_, chunks):
                content = b"".join(chunks)
            digest = file.digest()
            digest.update(content)
            if len(content) != file.size or (file.identity and digest.hexdigest() != file.identity):
                raise failures.BrokenTransferError(f"{file.name} arrived damaged")
            return content

        return self._ask(file.name, ask)

    @contextlib.contextmanager
    def stream(self, listing: Listing, file: File, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes of a file as they come.

        Args:
            listing: the commit.
            file: one of its files.
            offset: where to begin.

        Yields:
            Where the bytes really begin (0 where a server ignores the wish), and the bytes.
        """
        # Only large files are in xet storage, and asking costs a request.
        if self._xet and file.sha256:
            source = self._xet.find(self.url(listing, file), self.endpoint, self.timeout)
            if source is not None:
                yield offset, self._xet.chunks(source, file.size, offset)
                return
        with self._http(listing, file, offset) as (begin, chunks):
            yield begin, chunks

    def url(self, listing: Listing, file: File) -> str:
        """Where a file can be fetched."""
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(listing.repository.id, file.name, revision=listing.commit, endpoint=self.endpoint))

    @contextlib.contextmanager
    def _http(self, listing: Listing, file: File, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        from huggingface_hub import get_session, hf_raise_for_status

        # Compressed, a small file would have neither a length nor meaningful ranges.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        session = get_session()
        url = self.url(listing, file)
        with session.stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.is_redirect or response.status_code not in (200, 206):
                raise ValueError(f"{response.status_code} for {file.name}, without its content")
            self._reached = True
            begin = _begin(response) if response.status_code == 206 else 0
            if begin not in (0, offset):
                raise failures.BrokenTransferError(f"the server sends bytes from {begin:,} on instead of {offset:,}")
            yield begin, response.iter_bytes()

    def _branches(self, repository: Repository) -> list[tuple[str, str]]:
        refs = self._api().list_repo_refs(repository.id)
        found = [(str(branch.name), str(branch.target_commit)) for branch in refs.branches]
        return sorted(found, key=lambda branch: (branch[0] != "main", _natural(branch[0])))

    def _branch_names(self, repository: Repository) -> list[str]:
        """Empty if the Hub does not say."""
        with contextlib.suppress(Exception):
            return [name for name, _ in self._branches(repository)]
        return []

    def _near(self, repository: Repository) -> list[str]:
        """Repositories with similar names, the nearest first; empty if the Hub does not say."""
        found: dict[str, None] = {}
        first_word = re.split(r"[-_.]", repository.name)[0]
        with contextlib.suppress(Exception):
            searches = ({"search": repository.name}, {"author": repository.owner}, {"search": first_word})
            for search in searches:
                models = self._api().list_models(**search, limit=100)
                found.update(dict.fromkeys(str(model.id) for model in models))
        return difflib.get_close_matches(repository.id, found, 3, 0.6)

    def close(self) -> None:
        """Stop what is still being received."""
        if self._xet:
            self._xet.close()

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(self.endpoint, token=self._token, library_name="exl", library_version=installed_version())

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        patience = self.patience(what)
        while True:
            try:
                answer = call()
            except Exception as error:
                # Where nothing was ever reached there is no network, which waiting does not mend.
                patience.failed(error, reconnect=self._reached)
            else:
                self._reached = True
                return answer


def _file(name: str, size: int | None, blob_id: str | None, lfs: Any) -> File:
    count = int(lfs.size if lfs else size or 0)
    if count < 0:
        raise ValueError(f"{name} of {count} bytes")
    return File(name, count, str(blob_id or ""), str(lfs.sha256) if lfs else "")


def _license(info: Any) -> str:
    card = getattr(info, "card_data", None)
    value = (card.get("license_name") or card.get("license")) if card is not None else None
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key under which 4.0bpw comes before 10.0bpw."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def _begin(response: Any) -> int:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else 0
