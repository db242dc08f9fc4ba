"""A server's life: it listens, loads, serves, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import resource
import signal
import socket
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from exl_cli.errors import ExitCode, UsageError, param
from exl_cli.server.errors import RETRY_AFTER, ApiError
from exl_cli.server.state import ServerState
from exl_cli.system.units import counted

# After a fault of the device, or when no grace is left: for responses to be sent.
_LAST_SECONDS = 2
# For a client to send the head of a request.
_HEAD_SECONDS = 60.0
# For a client to read some of what waits for it.
_READ_SECONDS = 60.0
# Each connection is one. Many systems allow 1,024 unless asked for more.
_OPEN_FILES = 65_536
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SOCKET_OPTIONS = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 120_000))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: the address cannot be used.
    """
    where = f"{param('host')} {host} {param('port')} {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{where}: {reason}", "use an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these: a client that vanished without a word is noticed within two minutes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _SOCKET_OPTIONS:
            if hasattr(socket, option):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        hint = {
            errno.EADDRNOTAVAIL: "use an address of this machine",
            errno.EACCES: f"choose a {param('port')} from 1024 up; lower ones need privileges",
        }.get(error.errno or 0, f"choose another {param('port')}, or stop the program that uses it")
        raise UsageError(f"{where}: {error.strerror}", hint) from error
    return listener


def raise_file_limit() -> None:
    """Let this process have as many connections as the system allows it."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if limit not in (resource.RLIM_INFINITY, wanted) and limit < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class _Connection(H11Protocol):
    """uvicorn's, closed when the head of a request does not come in time, or a response is not read."""

    def __init__(self, *args: Any, head_seconds: float, read_seconds: float, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._head_seconds, self._read_seconds = head_seconds, read_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take a part of one."""
        super().data_received(data)
        if self._is_between_requests():
            self._expect_head()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        super().connection_lost(exc)
        self._stop_timer()
        self._stop_read_timer()

    def pause_writing(self) -> None:
        """Expect the client to read: the system's buffers and the transport's are full."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stop_read_timer()

    def _expect_reading(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(self._read_seconds, self._abort_unless_read, waiting)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _abort_unless_read(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() < waiting:
            self._expect_reading()
        else:
            # As if the client had gone away, which ends its generation.
            self.transport.abort()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_seconds, self._close_unless_busy)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_unless_busy(self) -> None:
        if self._is_between_requests():
            self.timeout_keep_alive_handler()


class _UvicornLog(logging.Handler):
    """What uvicorn has to say as lines of the server's log."""

    def __init__(self, state: ServerState) -> None:
        super().__init__(logging.WARNING)
        self._state = state

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self._state.note(record.getMessage().strip())
        if record.exc_info and self._state.settings.debug:
            self._state.warn("".join(traceback.format_exception(*record.exc_info)))


class _Uvicorn(uvicorn.Server):
    """uvicorn without its handling of signals, which is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


async def serve(
    app: ASGIApp,
    state: ServerState,
    listener: socket.socket,
    *,
    preload: Sequence[str],
    grace: float,
    signals: bool,
    head_seconds: float = _HEAD_SECONDS,
    read_seconds: float = _READ_SECONDS,
) -> None:
    """Serve until a signal, or until a device fails.

    Args:
        app: from `create_app`.
        state: its state.
        listener: from `listen`.
        preload: models to load before `/health` says ok.
        grace: seconds that requests under way have once a signal has come.
        signals: SIGTERM and SIGINT end it, a second one at once; in the main thread only.
        head_seconds: after which a connection is closed whose request's head has not come.
        read_seconds: after which a connection is closed whose client reads nothing of what waits for it.

    Raises:
        ExlError: a model cannot be loaded at the start, or a `DeviceError`.
    """
    connection: Any = partial(_Connection, head_seconds=head_seconds, read_seconds=read_seconds)
    config = uvicorn.Config(
        app, loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        http=connection,
        timeout_keep_alive=65, timeout_graceful_shutdown=math.ceil(grace) + _LAST_SECONDS,
    )  # fmt: skip
    server = _Uvicorn(config)
    loop = asyncio.get_running_loop()
    stopped = ApiError(503, "the server shut down before the response was complete", "stopping", headers=RETRY_AFTER)

    def stop(number: int) -> None:
        if state.phase == "stopping":
            os._exit(ExitCode.INTERRUPTED)
        state.phase = "stopping"
        running = counted(state.accepted, "running generation")
        state.note(f"shutting down: waiting up to {grace:g} s for {running}" if state.accepted else "shutting down")
        loop.call_later(grace, state.end_all, stopped)
        server.should_exit = True

    if signals:
        for number in _SIGNALS:
            loop.add_signal_handler(number, stop, number)
    log = _UvicornLog(state)
    logging.getLogger("uvicorn").addHandler(log)
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(load_models(state, preload))
    failing = asyncio.create_task(state.failed.wait())

    def give_up(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (task is failing or task.exception()):
            config.timeout_graceful_shutdown = _LAST_SECONDS
            server.should_exit = True

    loading.add_done_callback(give_up)
    failing.add_done_callback(give_up)
    try:
        await serving
    finally:
        failing.cancel()
        loading.cancel()
        logging.getLogger("uvicorn").removeHandler(log)
        if signals:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
    with contextlib.suppress(asyncio.CancelledError):
        await loading
    if state.fault is not None:
        raise state.fault


async def load_models(state: ServerState, names: Sequence[str]) -> None:
    """Load models, and let `/health` say ok.

    Raises:
        ExlError: what is wrong with one.
    """
    for name in names:
        try:
            async with state.pool.use(name) as model:
                how = ", ".join(f"{key} {value}" for key, value in model.engine.facts.items())
                state.note(f"{name} is ready: {model.context_length:,} tokens, engine {model.engine.name} ({how})")
        except ApiError as error:
            raise error.__cause__ or error from None
    if state.phase == "loading":
        state.phase = "ok"
