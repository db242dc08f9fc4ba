"""Fake engines with known timing, for the benchmark tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import jsonschema
import torch
from typer.testing import CliRunner, Result

import exl_cli
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

MS = 1_000_000  # nanoseconds

SCHEMA = json.loads((Path(exl_cli.__file__).parent / "bench" / "schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


class SilentDecoder:
    """Decodes nothing."""

    def push(self, token_id: int) -> str:
        return ""

    special = push


class PacedEngine(GeneratorEngine):
    """Generates token 7 without end, at a known pace by a clock of its own, `now`, which nothing else moves.

    Args:
        prompt_seconds: reported for a prompt, whatever it takes.
        first, step: milliseconds that the first new token and each further one take.
        reused: prompt tokens that it says it found in its cache.
        tokens: the most that it generates; None for as many as are wanted.
        on_request: called with each request, before anything else.
    """

    name = "paced"

    def __init__(
        self,
        prompt_seconds: float = 0.25,
        first: int = 1,
        step: int = 1,
        reused: int = 0,
        tokens: int | None = None,
        context_length: int = 1024,
        on_request: Callable[[Request], None] = lambda request: None,
    ) -> None:
        super().__init__()
        self.prompt_seconds, self.first, self.each = prompt_seconds, first, step
        self.reused, self.tokens, self.on_request = reused, tokens, on_request
        self.context_length = context_length
        self.facts: dict[str, str] = {"device": "none", "dtype": "float32", "threads": "2"}
        self.requests: list[Request] = []
        self.closed = False
        self.now = 0

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
        self.now += MS * (self.each if count else self.first)

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
    """Computes up to four requests together: passes of 20 ms, 1 ms more for each token, and one prompt a pass.

    Args:
        size: requests that it waits for before it begins.
    """

    name = "batching"
    max_batch = 4

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.gate = threading.Event()  # to be cleared while requests are being queued
        self.gate.set()
        self._begun: set[int] = set()

    def step(self) -> Iterable[Event]:
        self.gate.wait()
        self._begun &= self._responses.keys()
        prompts = [request_id for request_id in self._responses if request_id not in self._begun]
        if not self._begun and len(prompts) < self.size:
            return
        self._begun.update(prompts[:1])
        waiting = {request_id: self._responses.pop(request_id) for request_id in prompts[1:]}
        self.now += 20 * MS
        yield from super().step()
        self._responses |= waiting


class TurnsEngine(PacedEngine):
    """Says that it batches, and computes one request after the other."""

    name = "turns"
    max_batch = 4

    def step(self) -> Iterable[Event]:
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


def stopping_after(requests: int, error: BaseException | None = None) -> PacedLoader:
    """Loads an engine whose request of that number raises: Ctrl-C, or an error."""

    def count(request: Request) -> None:
        if len(loader.engines[-1].requests) >= requests:  # type: ignore[attr-defined]
            raise error or KeyboardInterrupt

    loader = PacedLoader(lambda: PacedEngine(on_request=count))
    return loader


FAILURE = EngineError("the device fell off", "put it back")

SHORT = ("-p", "20", "-n", "4", "-r", "3")


def bench(loader: PacedLoader, *args: str) -> Result:
    """`exl bench` with that loader."""
    return CliRunner().invoke(app, ["bench", *args], obj=State(load=loader))
