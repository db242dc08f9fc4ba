"""A fake Hub on loopback: a real HTTP server with models and faults; see `fakehub_handler`."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from fakehub_handler import Fault, Handler, Seen

_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass
class Entry:
    """A file of a commit."""

    name: str
    content: bytes
    lfs: bool
    claimed_size: int | None = None
    xet_hash: str = ""
    claims: dict[str, Any] = field(default_factory=dict)  # put over what the listing says of the file

    @property
    def size(self) -> int:
        return len(self.content) if self.claimed_size is None else self.claimed_size

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        stored = pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()  # noqa: S324 - git's own


@dataclass
class Repository:
    """A model on the server."""

    id: str
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, list[Entry]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", **sizes: int) -> str:
        """Put files on a branch; returns the commit. `sizes` (by stem) lets the listing claim other sizes."""
        entries = [
            Entry(name, content, name.endswith(_LFS_SUFFIXES), sizes.get(name.partition(".")[0]))
            for name, content in sorted(files.items())
        ]
        text = "".join(f"{entry.name} {entry.sha256} {entry.size}\n" for entry in entries) + branch
        commit = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324
        self.branches[branch] = commit
        self.commits[commit] = entries
        return commit

    def files(self, branch: str = "main") -> dict[str, Entry]:
        """The files of a branch by name."""
        return {entry.name: entry for entry in self.commits[self.branches[branch]]}

    def claim(self, name: str, **claims: Any) -> None:
        """Let listings say something else of a file, whatever its commit."""
        for entries in self.commits.values():
            for entry in entries:
                if entry.name == name:
                    entry.claims |= claims


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what many tests are about."""


class FakeHub:
    """The server; a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        # Any other token is somebody's, so that a developer who is logged in can run the tests.
        self.bad_tokens: set[str] = {"hf_bad"}
        self.approved: set[str] = {"hf_good"}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.xet_endpoint = ""
        self.hidden_headers: set[str] = set()  # not sent
        self.watch: Callable[[Seen], None] = lambda seen: None
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for fault in self.faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()

    def repository(self, id: str, files: dict[str, bytes] | None = None, **options: Any) -> Repository:
        """Make a repository, with these files on its main branch."""
        made = self.repositories[id] = Repository(id, **options)
        if files is not None:
            made.commit(files)
        return made

    def fault(self, where: str, **what: Any) -> Fault:
        """Let something go wrong from now on."""
        made = Fault(where, **what)
        self.faults.append(made)
        return made

    def sent(self, where: str = "*") -> int:
        """Bytes of bodies sent for paths that match."""
        return sum(seen.sent for seen in self.seen if fnmatch.fnmatchcase(seen.path, where))

    def requests(self, where: str = "*") -> list[Seen]:
        """The requests whose paths match, in order."""
        return [seen for seen in self.seen if fnmatch.fnmatchcase(seen.path, where)]

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fnmatch.fnmatchcase(path, fault.where):
                    fault.times -= 1
                    return fault
        return None
