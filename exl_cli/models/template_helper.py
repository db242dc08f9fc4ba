"""Client of the sandboxed helper process that renders chat templates and tests tokenizers; see `template_worker`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from datetime import datetime
from io import FileIO
from typing import Any, NamedTuple, cast

from exl_cli.models import template_worker
from exl_cli.models.template_worker import FAILED, SPENT, STOPPED, max_text

_MEMORY = 512 << 20
_START_SECONDS = 60.0
_PIECE = 1 << 20
_VERBS = {"templates": "renders", "tokenizers": "tries"}


class Reply(NamedTuple):
    """A reply. `text` is the result if `kind` is TEXT, else the reason; `line` is the template's line, or 0."""

    kind: str
    line: int
    text: str


class Helper:
    """A helper process, started on demand and restarted after it was killed. Thread-safe: a lock orders requests.

    The process ends with this object, and at EOF when the parent dies. After a fork, the child starts a new one.

    Args:
        deadline: seconds per request. Starting the process counts, but a request always gets half of it.
        program: "templates" or "tokenizers".
        cpu_seconds: CPU time per request (RLIMIT_CPU); by default the deadline.
        memory: bytes of address space (RLIMIT_AS).
    """

    def __init__(
        self, deadline: float = 4.5, program: str = "templates", cpu_seconds: int = 0, memory: int = _MEMORY
    ) -> None:
        self._deadline, self._program = deadline, program
        self._arguments = program, str(cpu_seconds or math.ceil(deadline)), str(memory)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        _helpers.add(self)

    @property
    def pid(self) -> int | None:
        """Process id; None if it is not running."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process if needed, without waiting for it."""
        with self._lock, contextlib.suppress(OSError):
            self._start()

    def render(self, source: str, variables: dict[str, Any]) -> Reply:
        """Render a Jinja template with JSON-serialisable variables; the process caches compiled templates."""
        return self.ask(source, datetime.now().isoformat(), variables)

    def ask(self, *request: Any) -> Reply:
        """Send a JSON-serialisable request and wait; without a reply the result is STOPPED or FAILED."""
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            end = time.monotonic() + self._deadline
            if self._process and self._process.poll() is not None:  # killed since the last request
                self._end()
            try:
                process = self._start()
                if not self._ready and (reply := _exchange(process, b"", _START_SECONDS)).text:
                    self._end()
                    return reply
                self._ready = True
                # Startup counts against the deadline, but leave at least half of it for the request.
                reply = _exchange(process, line, max(end - time.monotonic(), self._deadline / 2))
            except TimeoutError:
                reply = Reply(SPENT, 0, f"it took more than {self._deadline:g} seconds")
            except EOFError:
                reply = Reply(SPENT, 0, f"it crashed the process that {_VERBS[self._program]} it")
                if not self._ready:  # it had not read any untrusted input yet
                    reply = Reply(FAILED, 0, "the helper process exited during startup")
            except OSError as error:
                reply = Reply(FAILED, 0, f"cannot start the helper process: {error.strerror}")
            except BaseException:  # KeyboardInterrupt: a late reply would be taken for that of the next request
                self._end()
                raise
            if reply.kind == SPENT or not self._ready:
                self._end()
            return reply._replace(kind=STOPPED) if reply.kind == SPENT else reply

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            program = (sys.executable, "-I", "-S", "-W", "ignore", template_worker.__file__)
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*program, *self._arguments, *filter(os.path.isabs, sys.path)],
                bufsize=0,  # a buffered stream has a lock, which a forked child could find locked for good
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Some Python builds need it to find libpython.
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                start_new_session=True,
            )
            self._ready = False
            self._kill = weakref.finalize(self, _kill, self._process)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._kill()
        self._process = None

    def _forget(self) -> None:
        """In a forked child: drop the parent's process and its lock, which a parent's thread may hold."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._kill.detach()
            for stream in filter(None, (self._process.stdin, self._process.stdout)):
                stream.close()
        self._process = None


_helpers: weakref.WeakSet[Helper] = weakref.WeakSet()


def _forget_all() -> None:
    for helper in _helpers:
        helper._forget()


os.register_at_fork(after_in_child=_forget_all)


def try_tokenizer(data: bytes) -> Reply:
    """Test a tokenizer.json on a short text, in a fresh helper process; see `template_worker.trier`."""
    # Encoding the text takes milliseconds, but loading a large file takes seconds and memory.
    megabytes = len(data) >> 20
    helper = Helper(20.0 + 2 * megabytes, "tokenizers", 5 + megabytes // 2, _MEMORY + 8 * len(data))
    return helper.ask(data.decode("utf-8", "replace"))


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> Reply:
    """Send a request and wait for the reply.

    Raises:
        TimeoutError: no reply in time; the process has been killed.
        EOFError: the process ended, or sent something that is not a reply.
    """
    end = time.monotonic() + seconds
    alarm = threading.Timer(seconds, process.kill)
    alarm.daemon = True
    alarm.start()
    stdin, stdout = cast("tuple[FileIO, FileIO]", (process.stdin, process.stdout))
    reply = bytearray()
    try:
        with contextlib.suppress(BrokenPipeError):
            rest = memoryview(request)
            while rest:
                rest = rest[stdin.write(rest) :]
        while not reply.endswith(b"\n") and len(reply) < 6 * max_text(len(request)) and (piece := stdout.read(_PIECE)):
            reply += piece
        kind, line, text = json.loads(reply)
        return Reply(str(kind), int(line), str(text))
    except (ValueError, TypeError, RecursionError):
        raise TimeoutError if time.monotonic() >= end else EOFError from None
    finally:
        alarm.cancel()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with process, contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # a session leader, so also a group leader
