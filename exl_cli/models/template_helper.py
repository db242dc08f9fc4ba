"""The near side of the process that renders chat templates or tries tokenizers: starting it, asking it, ending it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from exl_cli.models import template_worker
from exl_cli.models.template_worker import FAILED, HEADER, SIZE, STOPPED, TEXT, max_text

_MEMORY = 512 << 20
_START_SECONDS = 60.0
_PIECE = 1 << 20


class Limits(NamedTuple):
    """What a helper process runs, and within what limits.

    Attributes:
        program: "templates" or "tokenizers".
        packages: what it imports.
        verb: what it does with a request, for messages.
        deadline: seconds that an answer may take.
        cpu_seconds: seconds of computing that it may take.
        memory: bytes of address space.
    """

    program: str
    packages: tuple[str, ...]
    verb: str
    deadline: float
    cpu_seconds: int
    memory: int = _MEMORY


class Reply(NamedTuple):
    """What came of a request: text where `kind` is TEXT, else the reason, and the template's line or 0."""

    kind: bytes
    line: int
    text: str


class Helper:
    """A process that answers requests about one stranger's file and can do nothing else: see `template_worker`.

    It starts at the first request, or ahead of it by `start`, and again after something ended it. It ends with this
    object and with this process, in whatever way that ends; a process forked from this one starts its own. Threads take
    turns.

    Args:
        limits: what it may use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        _helpers.add(self)

    @property
    def pid(self) -> int | None:
        """The process's id; None where none has been started."""
        return self._worker.pid if self._worker else None

    def start(self) -> None:
        """Start the process where it is not running, without waiting for it."""
        with self._lock, contextlib.suppress(OSError):
            self._worker = self._worker or _Worker(self._limits)

    def ask(self, request: bytes) -> Reply:
        """Send a request and wait for the reply; it is of kind STOPPED or FAILED where none came."""
        with self._lock:
            try:
                return self._ask(request)
            except TimeoutError:
                reply = Reply(STOPPED, 0, f"it takes more than {self._limits.deadline:g} seconds")
            except (EOFError, UnicodeDecodeError):
                if self._worker is not None and self._worker.started:
                    reply = Reply(STOPPED, 0, f"it ended the process that {self._limits.verb} it")
                else:
                    reply = Reply(FAILED, 0, "the process for it ends while it starts")
            except OSError as error:
                reply = Reply(FAILED, 0, f"no process can be started for it: {error.strerror}")
            except BaseException:  # KeyboardInterrupt: the reply would be taken for that to the next request
                self._end()
                raise
            self._end()
            return reply

    def _ask(self, request: bytes) -> Reply:
        began = time.monotonic()
        if self._worker is not None:
            with contextlib.suppress(EOFError):  # it may have been killed since the last request
                return self._worker.ask(request, self._limits.deadline)
            self._end()
        left = self._limits.deadline - (time.monotonic() - began)
        self._worker = _Worker(self._limits)
        return self._worker.ask(request, left)

    def close(self) -> None:
        """End the process, if it runs."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker = None

    def forget(self) -> None:
        """In a forked process: leave the helper to the parent, and the lock to whichever thread there holds it."""
        self._lock = threading.Lock()
        if self._worker is not None:
            self._worker.forget()
        self._worker = None


class TemplateHelper(Helper):
    """A process that renders chat templates.

    Args:
        deadline: seconds that a rendering may take; with the start of a process it stays below five by default.
    """

    def __init__(self, deadline: float = 4.5) -> None:
        super().__init__(Limits("templates", ("jinja2", "markupsafe"), "renders", deadline, math.ceil(deadline)))

    def render(self, source: str, variables: dict[str, Any]) -> Reply:
        """Render a template.

        Args:
            source: the Jinja text. It is compiled once, however often it renders.
            variables: of JSON's types.
        """
        asked = [source, datetime.now().isoformat(), variables]
        return self.ask(json.dumps(asked, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def try_tokenizer(data: bytes) -> Reply:
    """Try the tokenizer of a tokenizer.json on a short text.

    A text of that size takes milliseconds; the file itself may be large and takes some seconds to read.
    """
    megabytes = len(data) >> 20
    helper = Helper(
        Limits(
            "tokenizers",
            ("tokenizers",),
            "tries",
            deadline=20.0 + 2 * megabytes,
            cpu_seconds=5 + megabytes // 2,
            memory=_MEMORY + 8 * len(data),
        )
    )
    try:
        return helper.ask(data)
    finally:
        helper.close()


_helpers: weakref.WeakSet[Helper] = weakref.WeakSet()


def _forget_all() -> None:
    for helper in _helpers:
        helper.forget()


os.register_at_fork(after_in_child=_forget_all)


class _Worker:
    """A running process.

    Attributes:
        pid: its id.
        started: it has answered; before that it has seen nothing of a stranger's.
        end: kills it; called at the latest when this object or the interpreter ends.
    """

    def __init__(self, limits: Limits) -> None:
        specs = [importlib.util.find_spec(name) for name in limits.packages]
        folders = {str(Path(spec.origin).absolute().parents[1]) for spec in specs if spec and spec.origin}
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [
                *(sys.executable, "-I", "-S", "-W", "ignore", template_worker.__file__),
                *(limits.program, str(limits.cpu_seconds), str(limits.memory), *folders),
            ],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Some Pythons find their own library by it.
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            start_new_session=True,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        self._input, self._output = (stream.fileno() for stream in (stdin, stdout) if stream is not None)
        os.set_blocking(self._input, False)
        self.started = False
        self.pid = self._process.pid
        self.end = weakref.finalize(self, _kill, self._process)

    def ask(self, request: bytes, seconds: float) -> Reply:
        """Send a request and wait for the reply.

        Raises:
            TimeoutError: it did not come within so many seconds.
            EOFError: the process has ended, or sends something else than a reply.
        """
        if not self.started:
            reply = self._receive(0, time.monotonic() + _START_SECONDS)
            if reply.kind != TEXT:
                return reply
            self.started = True
        end = time.monotonic() + seconds
        rest = memoryview(SIZE.pack(len(request)) + request)
        with contextlib.suppress(BrokenPipeError):  # it may have replied before it had read all
            while rest:
                _wait(self._input, select.POLLOUT, end)
                rest = rest[os.write(self._input, rest[:_PIECE]) :]
        return self._receive(len(request), end)

    def _receive(self, request: int, end: float) -> Reply:
        kind, line, size = HEADER.unpack(self._read(HEADER.size, end))
        if size > 4 * max_text(request):
            raise EOFError
        return Reply(kind, line, self._read(size, end).decode("utf-8", "surrogatepass"))

    def _read(self, size: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self._output, select.POLLIN, end)
            piece = os.read(self._output, min(size - len(data), _PIECE))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def forget(self) -> None:
        """In a forked process: close the pipes and let the process live."""
        self.end.detach()
        _close(self._process)


def _wait(file: int, event: int, end: float) -> None:
    poll = select.poll()
    poll.register(file, event)
    if not poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
        raise TimeoutError


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session
    _close(process)
    process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
