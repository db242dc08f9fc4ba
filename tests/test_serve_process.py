"""`exl serve` as a process: output, signals, refusals before loading."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from helpers import until
from serving import CHAT, asking
from typer.testing import CliRunner, Result

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.errors import DeviceError, ExitCode, OutOfMemoryError


class ServeProcess:
    """`exl serve --port 0` and its log.

    Args:
        flags: more of its flags.
        program: what Python runs in the place of exl.

    Attributes:
        log: its lines so far.
        process: it.
    """

    def __init__(self, *flags: str, program: Sequence[str] = ("-m", "exl_cli")) -> None:
        command = [sys.executable, *program, "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def port(self) -> int:
        until(lambda: any("listening on" in line for line in self.log) or self.process.poll() is not None)
        listening = re.search(r"listening on http://[\d.]+:(\d+)", "".join(self.log))
        assert listening, self.log
        return int(listening[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        until(lambda: httpx.get(f"{self.url}/health", timeout=60).status_code == 200)

    def ended(self) -> int:
        """Its exit code."""
        code = self.process.wait(60)
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)


@contextmanager
def scripted(*flags: str) -> Iterator[ServeProcess]:
    """One with a scripted model, ready."""
    program = Path(__file__).with_name("scripted_serve.py")
    server = ServeProcess("--grace", "2m", *flags, program=[str(program)])
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.ended()


def test_a_signal_finishes_running_requests_and_refuses_new_ones() -> None:
    with scripted("--host", "0.0.0.0", "--log-prompts") as server:  # noqa: S104
        drain(server)
    text = "".join(server.log)
    assert (
        "WARNING: no API key is required, so anyone who can reach 0.0.0.0 can use these models; see --api-key-file"
        in text
    )
    assert "fable-7m is ready: 1,024 tokens" in text
    assert "shutting down: waiting up to 120 s for 1 running generation" in text
    assert 'prompt: "user' in text
    assert "Traceback" not in text


def drain(server: ServeProcess) -> None:
    body = asking(stream=True, max_tokens=200, ignore_eos=True)
    with socket.create_connection(("127.0.0.1", server.port)) as half_open, httpx.Client() as kept:
        half_open.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
        assert kept.get(f"{server.url}/v1/models").status_code == 200
        too_long = asking(stream=True, messages=[{"role": "user", "content": "word " * 2000}])
        assert kept.post(server.url + CHAT, json=too_long).json()["error"]["code"] == "context_length_exceeded"
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")  # and no comment, as it had not to wait
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.ended() == ExitCode.OK  # long before the end of its two minutes


def is_refused(server: ServeProcess) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_signal_exits_immediately() -> None:
    body = asking(stream=True, n=100, max_tokens=900)
    with scripted() as server, httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # dropped, it would close the connection
        next(lines)
        server.process.send_signal(signal.SIGINT)
        until(lambda: any("for 100 running generations" in line for line in server.log))
        until(lambda: is_refused(server))
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == ExitCode.INTERRUPTED


def test_what_is_under_way_when_the_grace_is_over_ends_with_an_error() -> None:
    with scripted("--grace", "0.2s") as server, ThreadPoolExecutor(1) as pool:
        with httpx.stream("POST", server.url + CHAT, json=asking(True, max_tokens=900, n=9), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            whole = pool.submit(httpx.post, server.url + CHAT, json=asking(max_tokens=900, n=9), timeout=60)
            until(lambda: "exl_requests_waiting 17.0" in httpx.get(f"{server.url}/metrics", timeout=60).text)
            server.process.send_signal(signal.SIGTERM)
            assert '"code":"stopping"' in [line for line in lines if line][-1]
        assert whole.result().status_code == 503
        assert server.ended() == ExitCode.OK
    assert "Traceback" not in "".join(server.log)


def test_a_fault_of_the_device_is_said_to_all_and_ends_the_process_with_its_code() -> None:
    with scripted() as server, ThreadPoolExecutor(3) as pool:
        bodies = [asking(seed=13), asking(), asking(stream=True)]
        answers = [pool.submit(httpx.post, server.url + CHAT, json=bodies[0], timeout=60)]
        until(lambda: "exl_requests_running 1.0" in httpx.get(f"{server.url}/metrics", timeout=60).text)
        answers += [pool.submit(httpx.post, server.url + CHAT, json=body, timeout=60) for body in bodies[1:]]
        for answer in answers:
            assert answer.result().json()["error"]["code"] == "engine_failed"
        assert server.ended() == ExitCode.ENGINE
    assert "error: an illegal memory access was encountered" in server.log[-1]


# --- before anything is loaded ----------------------------------------------------------------------------------------


def no_load(*args: object) -> None:
    raise AssertionError("nothing should be loaded")


def failing(*args: object) -> None:
    raise DeviceError("the GPU fell off the bus")


def serve(*flags: str, load: object = no_load) -> Result:
    return CliRunner().invoke(app, ["serve", *flags], obj=State(load=load))


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


@pytest.fixture
def empty(tmp_path: Path) -> str:
    path = tmp_path / "keys.txt"
    path.touch()
    return str(path)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (
            "--port {taken}",
            ExitCode.USAGE,
            "--port {taken}: Address already in use; choose another --port",
        ),
        ("--host 192.0.2.1", ExitCode.USAGE, "8080: Cannot assign requested address; use an address of this"),
        ("--host no-such-host.invalid", ExitCode.USAGE, "--host no-such-host.invalid --port 8080: "),
        ("--api-key-file {empty}", ExitCode.USAGE, "--api-key-file {empty} contains no key; create one"),
        ("--api-key-file /dev/zero", ExitCode.DISK, "cannot read --api-key-file /dev/zero: it is a device; "),
        ("--api-key-file {empty}.none", ExitCode.DISK, "cannot read --api-key-file {empty}.none: No such file"),
    ],
)
def test_an_address_or_a_file_that_cannot_be_used(line: str, code: ExitCode, said: str, taken: str, empty: str) -> None:
    result = serve(*(word.format(taken=taken, empty=empty) for word in line.split()))
    assert result.exit_code == code, result.stderr
    assert said.format(taken=taken, empty=empty) in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_port_that_needs_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: object) -> None:
        """As Linux does for a normal user, unless the machine lets everyone have these ports."""
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "bind", bind)
    result = serve("--port", "80")
    assert result.exit_code == ExitCode.USAGE
    expected = "--port 80: Permission denied; choose a --port from 1024 up; lower ones need privileges\n"
    assert result.stderr.endswith(expected)


def test_a_served_name_may_point_to_a_folder_as_given(exl2_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(exl2_dir)
    given = f"{tmp_path}/model"
    for alias, exit_code in ((given, ExitCode.ENGINE), (exl2_dir.name, ExitCode.ENGINE), ("other", ExitCode.USAGE)):
        assert serve(given, "--served-name", f"mine={alias}", "--port", "0", load=failing).exit_code == exit_code


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("it needs 80 GiB"), DeviceError("the GPU fell off the bus")], ids=str
)
def test_a_load_that_fails_at_the_start_is_a_line_and_its_exit_code(error: OutOfMemoryError | DeviceError) -> None:
    def load(*args: object) -> None:
        raise error

    result = serve("--port", "0", load=load)
    assert result.exit_code == error.exit_code
    assert result.stderr.splitlines()[-1] == f"error: {error}"
