"""The near side of the process that renders chat templates or tries tokenizers: starting it, asking it, ending it."""

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
from exl_cli.models.template_worker import FAILED, STOPPED, max_text

_MEMORY = 512 << 20
_START_SECONDS = 60.0
_PIECE = 1 << 20
_VERBS = {"templates": "renders", "tokenizers": "tries"}


class Reply(NamedTuple):
    """The answer to a request: text where `kind` is TEXT, else the reason, and the template's line or 0."""

    kind: str
    line: int
    text: str


class Helper:
    """A process that answers requests about a stranger's file and can do nothing else: see `template_worker`.

    It starts at the first request, or ahead of it by `start`, and again after something ended it. It ends with this
    object and with this process, however that ends; a process forked from this one starts its own. Threads take turns.

    Args:
        deadline: seconds that an answer may take, the start of a process included where that takes less than half.
        program: of `template_worker`.
        cpu_seconds: seconds of computing that it may take; as many as the deadline has if not given.
        memory: bytes of address space.
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
        """The process's id; None where none has been started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process where it is not running, without waiting for it."""
        with self._lock, contextlib.suppress(OSError):
            self._start()

    def render(self, source: str, variables: dict[str, Any]) -> Reply:
        """Render a Jinja template, which is compiled once, with variables of JSON's types."""
        return self.ask(source, datetime.now().isoformat(), variables)

    def ask(self, *request: Any) -> Reply:
        """Send a request, of JSON's types, and wait for the reply; it is STOPPED or FAILED where none came."""
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
                # What its start took counts, but half of the time is for the answer.
                reply = _exchange(process, line, max(end - time.monotonic(), self._deadline / 2))
            except TimeoutError:
                reply = Reply(STOPPED, 0, f"it takes more than {self._deadline:g} seconds")
            except EOFError:
                reply = Reply(STOPPED, 0, f"it ended the process that {_VERBS[self._program]} it")
                if not self._ready:  # before that it has seen nothing of a stranger's
                    reply = Reply(FAILED, 0, "the process for it ends while it starts")
            except OSError as error:
                reply = Reply(FAILED, 0, f"no process can be started for it: {error.strerror}")
            except BaseException:  # KeyboardInterrupt: the reply would be taken for that to the next request
                self._end()
                raise
            if reply.kind == STOPPED or not self._ready:
                self._end()
            return reply

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            program = (sys.executable, "-I", "-S", "-W", "ignore", template_worker.__file__)
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*program, *self._arguments, *filter(os.path.isabs, sys.path)],
                bufsize=0,  # a buffer would have a lock, which a process forked meanwhile could not take
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Some Pythons find their own library by it.
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
        """In a forked process: leave the helper to the parent, and the lock to whichever thread there holds it."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._kill.detach()
            _close(self._process)
        self._process = None


_helpers: weakref.WeakSet[Helper] = weakref.WeakSet()


def _forget_all() -> None:
    for helper in _helpers:
        helper._forget()


os.register_at_fork(after_in_child=_forget_all)


def try_tokenizer(data: bytes) -> Reply:
    """Try the tokenizer of a tokenizer.json on a short text.

    A text of that size takes milliseconds; the file itself may be large and takes some seconds to read.
    """
    megabytes = len(data) >> 20
    helper = Helper(20.0 + 2 * megabytes, "tokenizers", 5 + megabytes // 2, _MEMORY + 8 * len(data))
    return helper.ask(data.decode("utf-8", "replace"))


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> Reply:
    """Send a request and wait for the reply.

    Raises:
        TimeoutError: it did not come within so many seconds, and the process was killed.
        EOFError: the process has ended, or sends something else than a reply.
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
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session
    _close(process)
    process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # what it did not read
            stream.close()
