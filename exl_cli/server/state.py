"""What the parts of a running server share."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import HTTPConnection

from exl_cli.engines.base import Chunk
from exl_cli.errors import DeviceError, ExlError
from exl_cli.server.errors import ApiError
from exl_cli.server.metrics import Metrics, StateCollector
from exl_cli.server.pool import ModelPool, ServedModel

Phase = Literal["loading", "ok", "stopping", "failed"]

Inbox = asyncio.Queue[Chunk | BaseException]


# The name of the API key that the current request came with; empty where none are set.
caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")


@dataclass
class Usage:
    """What the log says of one HTTP request: its tokens so far, and the error that it is answered with."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str = ""


usage: contextvars.ContextVar[Usage] = contextvars.ContextVar("usage")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server treats its clients.

    Attributes:
        queue: generations that may wait beyond those that engines compute.
        prefix_cache_per_key: a prompt's prefix is reused only by requests with the same key.
        keep_alive_seconds: without an event, after which a stream gets a comment.
        log_prompts: write prompts into the log.
        debug: write tracebacks into it.
    """

    queue: int = 1024
    prefix_cache_per_key: bool = False
    keep_alive_seconds: float = 10.0
    log_prompts: bool = False
    debug: bool = False


def _nothing(line: str) -> None:
    pass


@dataclass(eq=False)
class ServerState:
    """The server as its routes see it; see `server_state`.

    Attributes:
        pool: its models.
        settings: see there.
        note: takes a line of the log.
        warn: takes one that is shown however quiet the log is.
        phase: what `/health` says.
        accepted: generations that run or wait.
        inboxes: of generations that engines have.
        failed, fault: set by `fail`.
    """

    pool: ModelPool
    settings: Settings = field(default_factory=Settings)
    note: Callable[[str], None] = _nothing
    warn: Callable[[str], None] = _nothing
    phase: Phase = "loading"
    accepted: int = 0
    inboxes: set[Inbox] = field(default_factory=set)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    fault: BaseException | None = None
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics.registry.register(StateCollector(self))

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """Hold a model; see `ModelPool.use`. A fault of the device, in a load as well, fails the server."""
        try:
            async with self.pool.use(name) as model:
                yield model
        except ApiError as error:
            if isinstance(error.__cause__, DeviceError):
                self.fail(error.__cause__)
            raise

    def fail(self, error: BaseException) -> None:
        """Give up after a fault that the GPU does not recover from: everything under way ends with it."""
        self.phase, self.fault = "failed", error
        self.failed.set()
        self.end_all(error)

    def end_all(self, error: BaseException) -> None:
        """End every generation under way with an error."""
        for inbox in list(self.inboxes):
            inbox.put_nowait(error)

    def report(self, answer: ApiError, error: BaseException) -> None:
        """Log what is not the client's fault: a line, of a bug with its place."""
        if answer.status < 500:
            return
        error = error.__cause__ or error
        where = ""
        if answer.code == "internal_error" and error.__traceback__ is not None:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f" ({type(error).__name__}, {frame.filename}:{frame.lineno})"
        said = error.marked if isinstance(error, ExlError) else str(error)
        self.warn(f"{answer.status}: {' '.join(said.split())}{where}")
        if self.settings.debug:
            self.warn("".join(traceback.format_exception(error)))


async def server_state(connection: HTTPConnection) -> ServerState:
    """For routes: `Annotated[ServerState, Depends(server_state)]`."""
    state: ServerState = connection.app.state.server
    return state
