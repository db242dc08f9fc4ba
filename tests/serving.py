"""A server in a thread on loopback, over models that generate on command."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fakes import ScriptedEngine
from helpers import Recorder, until

from exl_cli import loader
from exl_cli.engines.base import Engine, Request
from exl_cli.engines.response import Step
from exl_cli.loader import Observer
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.server import run
from exl_cli.server.app import create_app
from exl_cli.server.gate import Policy
from exl_cli.server.pool import Catalog, ModelPool
from exl_cli.server.state import ServerState, Settings

CHAT = "/v1/chat/completions"


def asking(stream: bool = False, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, **fields}


class HeldEngine(ScriptedEngine):
    """Holds every request after each step for as long as it is told to hold.

    Attributes:
        failure: raised by the next step.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, "One two three four.", 1024)
        self.failure: BaseException | None = None
        self._go_on = threading.Event()
        self._go_on.set()

    def hold(self) -> None:
        self._go_on.clear()

    def let_go(self) -> None:
        self._go_on.set()

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        for step in super()._steps(request, is_cancelled):
            yield step
            while not self._go_on.wait(0.005):
                if is_cancelled():
                    return
            if self.failure is not None:
                raise self.failure


class HeldLoader:
    """Loads `HeldEngine`s in the place of `loader.load`.

    Attributes:
        engines: by the name of the model's folder, the last one loaded.
        loads: names in the order of their loads.
        failure: raised by the next load.
        go_on: cleared, it holds loads.
        at_once: the most loads that ran at the same time.
    """

    def __init__(self) -> None:
        self.engines: dict[str, HeldEngine] = {}
        self.loads: list[str] = []
        self.failure: BaseException | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.at_once = self._under_way = 0

    def __call__(
        self, info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions, observer: Observer, needed: int | None = None
    ) -> Engine:
        name = Path(info.path).name
        self.loads.append(name)
        self._under_way += 1
        self.at_once = max(self.at_once, self._under_way)
        try:
            assert self.go_on.wait(60)
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
        finally:
            self._under_way -= 1
        engine = self.engines[name] = HeldEngine(tokenizer)
        return engine


class Server:
    """A running server.

    Attributes:
        url: its address.
        state: its state, to be read only.
        log: its log.
        port: of its address.
        ended_by: the error that ended it.
    """

    def __init__(self, state: ServerState, log: list[str], port: int) -> None:
        self.state, self.log = state, log
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.ended_by: BaseException | None = None

    def get(self, path: str, **rest: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **rest)

    def post(self, path: str, body: Any = None, **rest: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **rest, **({} if body is None else {"json": body}))

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples whose labels hold these texts."""
        lines = self.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.partition(" ")[0].partition("{")[0] == name and all(label in line for label in labels)
        )

    def is_idle(self) -> bool:
        """Whether no generation is under way."""
        return not self.metric("exl_requests_running") + self.metric("exl_requests_waiting")


@contextmanager
def serving(
    models: Mapping[str, str | Path | None],
    load: Callable[..., Engine] = loader.load,
    policy: Callable[[Callable[[str], None]], Policy] | None = None,
    settings: Settings | None = None,
    *,
    preload: int = 1,
    folder: Path | None = None,
    aliases: Mapping[str, str] | None = None,
    any_name: bool = False,
    head_seconds: float = 60,
    **pool: Any,
) -> Iterator[Server]:
    """A server of these models, by name with their folders, None for fable-7m.

    Args:
        models: the models.
        load: what loads them.
        policy: makes its policy; takes its log.
        settings: its settings.
        preload: how many are loaded before it listens.
        folder, aliases, any_name: see `Catalog`.
        head_seconds: see `run.serve`.
        pool: see `ModelPool`.
    """
    resolved = {name: loader.resolve(None if path is None else str(path)) for name, path in models.items()}
    log = Recorder()
    begun, ended = threading.Event(), threading.Event()
    servers: list[Server] = []
    stops: list[Callable[[], object]] = []

    async def main() -> None:
        listener = run.listen("127.0.0.1", 0)
        catalog = Catalog(resolved, aliases, folder, any_name=any_name)
        state = ServerState(
            ModelPool(catalog, LoadOptions(engine="cpu"), log, load, **pool),
            settings or Settings(),
            note=log.note,
            warn=log.note,
        )
        app = create_app(state, None if policy is None else policy(log.note))
        servers.append(Server(state, log.notes, listener.getsockname()[1]))
        task = asyncio.ensure_future(
            run.serve(
                app,
                state,
                listener,
                preload=[*resolved][:preload],
                grace=1,
                signals=False,
                head_seconds=head_seconds,
            )
        )
        loop = asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(task.cancel))
        begun.set()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except Exception as error:
            servers[0].ended_by = error
        finally:
            listener.close()
            await state.pool.close()
            ended.set()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert begun.wait(60)
        server = servers[0]
        until(lambda: not thread.is_alive() or server.state.phase != "loading" or not preload)
        yield server
    finally:
        if not ended.is_set():
            stops[0]()
        thread.join()
