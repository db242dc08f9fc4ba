"""What the tests of the scheduler share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from fakeforward import FakeClock, FakeForward, sampler_for

from exl_cli.engines.base import Request
from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.batching import Batch
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.exllamav2.speculation import Drafter
from exl_cli.sampling import Sampling, build

GREEDY = build({}, "greedy")
Steps = Generator[Step, None, None]


def ask(ids: Iterable[int], new: int = 5, sampling: Sampling = GREEDY, seed: int = 0, **rest: Any) -> Request:
    return Request([*ids], sampling, new, seed, **rest)


class Model:
    """A scheduler, its streams and the model behind them."""

    def __init__(self, chunk: int = 2048, drafter: Drafter | None = None, **options: Any) -> None:
        self.clock = FakeClock()
        self.forward = FakeForward(clock=self.clock, **options)
        self.scheduler = Scheduler(self.forward, sampler_for, drafter=drafter, chunk=chunk, clock=self.clock)
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
