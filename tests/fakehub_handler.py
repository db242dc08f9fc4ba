"""How the Hub on loopback answers: the paths, headers and errors that huggingface_hub 2.4 knows, spoiled on demand.

What it speaks, as read in huggingface_hub's source and its documentation of the Hub's API:

    GET  /api/models?search=…, ?author=…             near names
    GET  /api/models/{id}/revision/{rev}?blobs=True  commit, files with sizes and hashes, model card
    GET  /api/models/{id}/refs                       branches
    GET  /api/models/{id}/xet-read-token/{rev}       where xet storage is
    HEAD, GET /{id}/resolve/{rev}/{file}             the file, or for LFS a redirect to
    GET  /cdn/{sha256}                               the storage behind, which must never see a token
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from fakehub import Entry, FakeHub, Repository


@dataclass
class Seen:
    """A request that came, and how much of the answer went out."""

    method: str
    path: str
    range: str
    token: str
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong, for requests whose path matches `where`.

    Attributes:
        where: a pattern.
        times: how many requests it spoils.
        status, headers, body: answer with this instead.
        drop_at: close the connection after so many bytes of the body.
        hold_at: stop sending after so many bytes, until `release` is set; `held` tells that it has come to that.
        trickle: send single small pieces of so many bytes.
        ignore_range: answer 200 with everything.
        extra: announce and send so many bytes more (or fewer).
        corrupt: send other bytes of the same length.
    """

    where: str
    times: int = 10**9
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    drop_at: int | None = None
    hold_at: int | None = None
    trickle: int = 0
    ignore_range: bool = False
    extra: int = 0
    corrupt: bool = False
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `fake` is the server that it belongs to."""

    fake: FakeHub
    protocol_version = "HTTP/1.1"
    # Or the body waits for the client to acknowledge the head, which takes 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        split = urlsplit(self.path)
        # Revisions with a slash come quoted; the path is taken apart before it is unquoted.
        self.parts = [unquote(part) for part in split.path.strip("/").split("/")]
        self.query = parse_qs(split.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.entry = Seen(self.command, unquote(split.path), self.headers.get("Range") or "", token)
        self.fake.seen.append(self.entry)
        self.fake.watch(self.entry)
        self.problem = self.fake.take_fault(self.entry.path)
        try:
            if self.problem and self.problem.status:
                self._answer(self.problem.status, self.problem.body, self.problem.headers)
            else:
                self._route(token)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, token: str) -> None:
        parts = self.parts
        if parts[0] == "cdn":
            self._content(self._find_sha(parts[1]), {})
        elif parts[:2] == ["api", "models"] and len(parts) == 2:
            search, author = (self.query.get(key, [""])[0].lower() for key in ("search", "author"))
            ids = [id for id in self.fake.repositories if search in id.lower() and id.lower().startswith(author)]
            self._json([{"id": id} for id in ids])
        elif parts[:2] == ["api", "models"]:
            self._with_repository("/".join(parts[2:4]), token, lambda repository: self._api(repository, parts[4:]))
        else:
            self._with_repository(
                "/".join(parts[:2]), token, lambda repository: self._resolve(repository, parts[3:], token)
            )

    def _with_repository(self, id: str, token: str, serve: Callable[[Repository], None]) -> None:
        repository = self.fake.repositories.get(id)
        if token in self.fake.bad_tokens:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not token):
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            serve(repository)

    def _api(self, repository: Repository, rest: list[str]) -> None:
        if rest[0] == "refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": at}
                for name, at in repository.branches.items()
            ]
            self._json({"branches": refs, "converts": [], "tags": []})
            return
        commit = self._commit(repository, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        if rest[0] == "revision":
            siblings = [
                {
                    "rfilename": entry.name,
                    "size": entry.size,
                    "blobId": entry.blob_id,
                    **({"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}} if entry.lfs else {}),
                    **entry.claims,
                }
                for entry in repository.commits[commit]
            ]
            body = {"_id": "0", "id": repository.id, "sha": commit, "private": repository.private, "siblings": siblings}
            self._json(
                {**body, "gated": "manual" if repository.gated else False, "cardData": repository.card, "tags": []}
            )
        elif rest[0] == "xet-read-token":
            self._json({"accessToken": "xet", "exp": 4102444800, "casUrl": self.fake.xet_endpoint})
        else:
            self._error(404, "", "no such path")

    def _resolve(self, repository: Repository, rest: list[str], token: str) -> None:
        commit = self._commit(repository, rest[0])
        if commit is None:
            return
        if repository.gated and token not in self.fake.approved:
            message = f"Access to model {repository.id} is restricted."
            self._error(403 if token else 401, "GatedRepo", message)
            return
        entry = next((entry for entry in repository.commits[commit] if entry.name == "/".join(rest[1:])), None)
        if entry is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.blob_id}"'}
        if entry.lfs:
            headers |= {
                "X-Linked-Etag": f'"{entry.sha256}"',
                "X-Linked-Size": str(entry.size),
                # Another origin, as the storage behind the Hub is.
                "Location": f"{self.fake.url.replace('127.0.0.1', 'localhost')}/cdn/{entry.sha256}",
            }
            if entry.xet_hash:
                route = f"{self.fake.url}/api/models/{repository.id}/xet-read-token/{commit}"
                headers |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
            self._answer(302, b"", headers)
        else:
            self._content(entry, headers)

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.branches.get(revision, revision)
        if commit in repository.commits:
            return commit
        self._error(404, "RevisionNotFound", f"Invalid rev id: {quote(revision)}")
        return None

    def _find_sha(self, sha256: str) -> Entry:
        return next(
            entry
            for repository in self.fake.repositories.values()
            for entries in repository.commits.values()
            for entry in entries
            if entry.sha256 == sha256
        )

    def _content(self, entry: Entry, headers: dict[str, str]) -> None:
        fault = self.problem or Fault("")
        body, status = entry.content, 200
        if fault.corrupt:
            body = bytes(byte ^ 0xFF for byte in body)
        if fault.extra:
            body = body + b"x" * fault.extra if fault.extra > 0 else body[: fault.extra]
        match = re.fullmatch(r"bytes=(\d+)-", self.entry.range)
        if match and not fault.ignore_range:
            begin = int(match[1])
            if begin >= len(body):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            headers = {**headers, "Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
            body, status = body[begin:], 206
        self._answer(status, body, headers)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            if name in self.fake.hidden_headers:
                continue
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.problem or Fault("")
        if fault.hold_at is not None:
            self._send(body[: fault.hold_at], fault)
            fault.held.set()
            fault.release.wait(60)
            body = body[fault.hold_at :]
        if fault.drop_at is not None:
            self._send(body[: fault.drop_at], fault)
            self.close_connection = True
            return
        self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        step = fault.trickle or 2**16
        for begin in range(0, len(body), step):
            self.wfile.write(body[begin : begin + step])
            self.entry.sent += len(body[begin : begin + step])
