"""Call functions that may crash or hang in a child process with a time limit.

A module with such functions ends with `if __name__ == "__main__": questions.answer(globals())`. The functions take
keyword arguments and return a dict; both must be JSON-serialisable.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from typing import Any, cast

from exl_cli.errors import ExlError
from exl_cli.system import processes

_asked: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Answer:
    """The result of a call, or why there is none.

    Attributes:
        value: the returned dict; None after a failure.
        problem: "crashed (SIGSEGV)", "timed out after 30 s", or the last line of the exception.
        kind: "hang", "crash", "error", or empty.
        output: the child's stderr, with whatever libraries printed.
    """

    value: dict[str, Any] | None
    problem: str = ""
    kind: str = ""
    output: str = ""

    @property
    def said(self) -> str:
        """The problem without the exception's class name."""
        head, colon, rest = self.problem.partition(": ")
        return rest if self.kind == "error" and colon and " " not in head else self.problem

    @property
    def failure(self) -> str:
        """The problem as a predicate: "crashed (SIGSEGV)", "fails: no such file"."""
        return f"fails: {self.said}" if self.kind == "error" else self.problem


class Respondent:
    """A child process, in its own session, that answers questions one after the other.

    It starts with the first question, and restarts with the next one after a crash, timeout or error. Imports are kept
    from one question to the next.

    Args:
        module: whose functions it calls.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Respondent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: str, seconds: float, arguments: Mapping[str, Any] | None = None) -> Answer:
        """Call the function `question`, and kill the process after `seconds`."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process = self._process or self._start()
        request = json.dumps([question, dict(arguments or {})]).encode() + b"\n"
        try:
            answer, err = _exchange(process, request, seconds)
        except TimeoutError:
            return self._failed(f"timed out after {seconds:g} s", "hang")
        except BaseException:  # KeyboardInterrupt
            self.close()
            raise
        code = process.returncode or 0
        if code < 0:
            return self._failed(f"crashed ({processes.signal_name(-code)})", "crash", err)
        if code:
            return self._failed(_last_line(err) or f"exited with code {code}", "error", err)
        try:
            return Answer(dict(json.loads(answer.splitlines()[-1])), output=err)
        except (ValueError, IndexError):
            return self._failed("exited without a result", "error", err)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _asked.discard(self._process)
            with self._process as process:
                if process.poll() is None:
                    _kill(process)
        self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        command = processes.command(self._module)
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)  # noqa: S603
        _asked.add(process)
        return process

    def _failed(self, problem: str, kind: str, output: str = "") -> Answer:
        self.close()
        return Answer(None, problem, kind, output)


def ask(module: str, question: str, seconds: float, arguments: Mapping[str, Any] | None = None) -> Answer:
    """Call `module`'s function `question` in a child process, in its own session, and kill it after `seconds`."""
    with Respondent(module) as respondent:
        return respondent.ask(question, seconds, arguments)


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> tuple[bytes, str]:
    """Send a request; returns the line of the answer, empty if the process ended instead, and its stderr until then.

    Raises:
        TimeoutError: neither came in time.
    """
    end = time.monotonic() + seconds
    stdin, stdout, stderr = cast("tuple[FileIO, FileIO, FileIO]", (process.stdin, process.stdout, process.stderr))
    read = {stdout: bytearray(), stderr: bytearray()}
    with contextlib.suppress(BrokenPipeError):
        stdin.write(request)
    with selectors.DefaultSelector() as selector:
        for stream in read:
            selector.register(stream, selectors.EVENT_READ)

        def take(timeout: float) -> bool:
            ready = selector.select(timeout)
            for key, _ in ready:
                stream = cast("FileIO", key.fileobj)
                if piece := stream.read(1 << 16):
                    read[stream] += piece
                else:
                    selector.unregister(stream)
            return bool(ready)

        while stdout in (key.fileobj for key in selector.get_map().values()) and not read[stdout].endswith(b"\n"):
            if not take(max(0.0, end - time.monotonic())):
                raise TimeoutError
        if not read[stdout].endswith(b"\n"):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
        while take(0):  # what was said before; others that hold stderr open are not waited for
            pass
    return bytes(read[stdout]), read[stderr].decode("utf-8", "replace")


def stop() -> None:
    """Kill all children that any thread is waiting for."""
    for process in list(_asked):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]


def answer(functions: Mapping[str, Any]) -> None:
    """Entry point of the child: a JSON array with a function's name and its keyword arguments per line of stdin."""
    out = processes.own_stdout()
    for line in sys.stdin.buffer:
        name, arguments = json.loads(line)
        try:
            facts = functions[name](**arguments)
        except ExlError as error:
            # str(error), as in a traceback, would replace `param` marks by bare names; the CLI needs the marks.
            sys.stderr.buffer.write(f"exl_cli.errors.{type(error).__name__}: {error.marked}\n".encode())
            sys.exit(1)
        sys.stdout.flush()
        sys.stderr.flush()
        out.write(json.dumps(facts).encode() + b"\n")
        out.flush()
    # Skip exit handlers, which may crash or wait.
    os._exit(0)
