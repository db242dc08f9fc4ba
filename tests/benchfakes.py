"""Engines without a model, for the tests of benchmarks: they implement the interface, and what they do is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from typer.testing import CliRunner, Result

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Event, Request
from exl_cli.engines.response import Decoder, GeneratorEngine, Step
from exl_cli.errors import EngineError
from exl_cli.loader import Observer
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.readings import DeviceMemory


class SilentDecoder:
    """Decodes nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def special(self, token_id: int) -> str:
        return ""


def spin(seconds: float) -> None:
    """Take so much time, computing."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class PacedEngine(GeneratorEngine):
    """Generates token 7 for ever, at a known pace.

    Args:
        prompt_seconds: reported for a prompt, whatever it takes.
        first, step: seconds that the first new token and each further one take.
        reused: prompt tokens that it says it found in its cache.
        tokens: the most that it generates; None for as many as are wanted.
        on_request: called with each request, before anything else.
    """

    name = "paced"

    def __init__(
        self,
        prompt_seconds: float = 0.25,
        first: float = 0.001,
        step: float = 0.001,
        reused: int = 0,
        tokens: int | None = None,
        context_length: int = 1024,
        on_request: Callable[[Request], None] = lambda request: None,
    ) -> None:
        super().__init__()
        self.prompt_seconds, self.first, self.seconds = prompt_seconds, first, step
        self.reused, self.tokens, self.on_request = reused, tokens, on_request
        self.context_length = context_length
        self.facts: dict[str, str] = {"device": "none", "dtype": "float32", "threads": "2"}
        self.requests: list[Request] = []
        self.closed = False

    def add(self, request_id: int, request: Request) -> None:
        self.requests.append(request)
        self.on_request(request)
        super().add(request_id, request)

    def _decoder(self, request: Request) -> Decoder:
        return SilentDecoder()

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        yield Step(prompt_seconds=self.prompt_seconds, reused_tokens=self.reused)
        count = 0
        while self.tokens is None or count < self.tokens:
            self._compute(count)
            count += 1
            yield Step((7,))

    def _compute(self, count: int) -> None:
        spin(self.seconds if count else self.first)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Every token is twice as likely as each other one to be followed by its successor, of 50 in all."""
        rows = torch.zeros(len(ids), 50)
        for place, token in enumerate(ids):
            rows[place, (token + 1) % 50] = torch.log(torch.tensor(2.0))
        return rows

    def memory(self) -> list[DeviceMemory]:
        return []

    def close(self) -> None:
        self.closed = True


class BatchEngine(PacedEngine):
    """Computes up to four requests together, and leaves the processor to others meanwhile, as a GPU does."""

    name = "batching"
    max_batch = 4

    def _compute(self, count: int) -> None:
        time.sleep(0.02)


class TurnsEngine(PacedEngine):
    """Says that it batches, and computes one request after the other."""

    name = "turns"
    max_batch = 4

    def step(self) -> Iterator[Event]:
        waiting = dict(self._responses)
        first = next(iter(waiting))
        self._responses = {first: waiting.pop(first)}
        yield from super().step()
        self._responses |= waiting


class PacedLoader:
    """Loads engines made by a function in the place of `loader.load`."""

    def __init__(self, make: Callable[[], Engine] = PacedEngine) -> None:
        self._make = make
        self.engines: list[Engine] = []
        self.options: list[LoadOptions] = []
        self.needed: list[int | None] = []

    def __call__(
        self, info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions, observer: Observer, needed: int | None = None
    ) -> Engine:
        self.options.append(options)
        self.needed.append(needed)
        observer.progress(1, 1)
        self.engines.append(self._make())
        return self.engines[-1]


def stopping_after(requests: int, error: BaseException | None = None) -> Callable[[], PacedEngine]:
    """Makes an engine whose request of that number raises: Ctrl-C, or an error."""

    def make() -> PacedEngine:
        def count(request: Request) -> None:
            if len(engine.requests) >= requests:
                raise error or KeyboardInterrupt

        engine = PacedEngine(on_request=count)
        return engine

    return make


FAILURE = EngineError("the device fell off", "put it back")

SHORT = ("-p", "20", "-n", "4", "-r", "3")


def bench(loader: PacedLoader, *args: str) -> Result:
    """`exl bench` with that loader."""
    return CliRunner().invoke(app, ["bench", *args], obj=State(load=loader))
