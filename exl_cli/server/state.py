"""What the parts of a running server share."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import HTTPConnection

from exl_cli.engines.base import Chunk
from exl_cli.server.metrics import Metrics
from exl_cli.server.pool import ModelPool

Phase = Literal["loading", "ok", "stopping", "failed"]

Inbox = asyncio.Queue[Chunk | BaseException]

# The name of the key that the current request came with; empty where no keys are set.
caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")


@dataclass(frozen=True)
class Settings:
    """How a server treats its clients.

    Attributes:
        queue: requests that may wait for the engine beyond those that it computes.
        prefix_cache_per_key: a prompt's prefix is reused only by the key that it came with.
        log_prompts: write prompts into the log.
    """

    queue: int = 1024
    prefix_cache_per_key: bool = False
    log_prompts: bool = False


@dataclass(eq=False)
class ServerState:
    """The server as its routes see it; see `server_state`.

    Attributes:
        pool: its models.
        settings: see there.
        note: writes a line to the log.
        phase: what `/health` says.
        accepted: requests that run or wait, each of several choices or prompts counted.
    """

    pool: ModelPool
    settings: Settings = field(default_factory=Settings)
    note: Callable[[str], None] = lambda line: None
    metrics: Metrics = field(default_factory=Metrics)
    phase: Phase = "loading"
    accepted: int = 0
    inboxes: set[Inbox] = field(default_factory=set)
    started: float = field(default_factory=time.time)

    def fail(self, error: BaseException) -> None:
        """Give up after a fault of the device: everything under way ends with it."""
        self.phase = "failed"
        for inbox in list(self.inboxes):
            inbox.put_nowait(error)


def server_state(connection: HTTPConnection) -> ServerState:
    """For routes: `Annotated[ServerState, Depends(server_state)]`."""
    state: ServerState = connection.app.state.server
    return state
