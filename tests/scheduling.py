"""Helpers for the scheduler tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from fakeforward import FakeClock, FakeForward, sampler_for

from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.exllamav2.speculation import Drafter
from exl_cli.engines.response import Step
from exl_cli.sampling import Sampling, build

GREEDY = build({}, "greedy")
Steps = Generator[Step, None, None]


class Batch:
    """Streams over a scheduler: pulling one that has nothing ready does the next step, which serves all."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._last_id = 0
        self._outcomes: dict[int, deque[Step | Exception | None]] = {}

    def steps(self, request: Request, limit: int) -> Steps:
        """The steps of one request, each as it comes; an empty one where a step of the scheduler brought none."""
        self.scheduler.check(request, limit)
        self._last_id += 1
        number = self._last_id
        outcomes = self._outcomes[number] = deque()
        try:
            self.scheduler.add(number, request, limit)
            while True:
                if not outcomes:
                    self.step()
                outcome = outcomes.popleft() if outcomes else Step()
                if isinstance(outcome, Exception):
                    raise outcome
                if outcome is None:
                    return
                yield outcome
        finally:
            self.scheduler.cancel(number)
            del self._outcomes[number]

    def step(self) -> None:
        for number, outcome in self.scheduler.step():
            self._outcomes[number].append(outcome)


def ask(ids: Iterable[int], new: int = 5, sampling: Sampling = GREEDY, seed: int = 0, **rest: Any) -> Request:
    return Request([*ids], sampling, new, seed, **rest)


class Model:
    """A scheduler, its streams and the model behind them."""

    def __init__(
        self, chunk: int = 2048, chunk_beside_decode: int = 2048, drafter: Drafter | None = None, **options: Any
    ) -> None:
        self.clock = FakeClock()
        self.forward = FakeForward(clock=self.clock, **options)
        self.scheduler = Scheduler(
            self.forward,
            sampler_for,
            drafter=drafter,
            chunk=chunk,
            chunk_beside_decode=chunk_beside_decode,
            clock=self.clock,
        )
        self.batch = Batch(self.scheduler)

    def steps(self, request: Request) -> Steps:
        return self.batch.steps(request, request.max_new_tokens)

    def expected(self, request: Request) -> list[int]:
        return self.forward.expected(request, request.max_new_tokens)

    def run(self, request: Request) -> tuple[list[int], int]:
        """The new tokens, which must be the right ones, and how many of the prompt were reused."""
        steps = [*self.steps(request)]
        tokens = [token for step in steps for token in step.token_ids]
        assert tokens == self.expected(request)
        return tokens, sum(step.reused_tokens for step in steps)


def pull(steps: Steps, until: Callable[[Step], object] = lambda step: step.token_ids) -> Step:
    """The next step that has tokens, or whatever is asked for."""
    return next(step for step in steps if until(step))
