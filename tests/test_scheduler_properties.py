"""Random arrivals, ends and failures with small caches: the text equals that without a cache."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from fakeforward import FakeClock, FakeForward, sampler_for
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scheduling import Batch

from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.draft_model import DraftModel
from exl_cli.engines.exllamav2.prompt_lookup import PromptLookup
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.response import Step
from exl_cli.sampling import build

# Beginnings that prompts have in common.
BASES = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [5, 6, 7, 8, 9, 20, 21, 22, 23, 24, 25], [40, 41, 42]]
prompts = st.builds(
    lambda base, cut, rest: (BASES[base][:cut] + rest) or [3],
    st.integers(0, len(BASES) - 1),
    st.integers(0, 14),
    st.lists(st.integers(0, 1), max_size=3),
)


class BrokenError(RuntimeError):
    """What a device raises."""


class Stream:
    """One consumer."""

    def __init__(self, steps: Generator[Step, None, None], expected: list[int], ids: list[int]) -> None:
        self.steps, self.expected, self.ids = steps, expected, ids
        self.tokens: list[int] = []
        self.prompt_seconds = 0


class Machine(RuleBasedStateMachine):
    """Streams on one scheduler; see the rules."""

    @initialize(
        shape=st.fixed_dictionaries(
            {
                "pages": st.integers(8, 30),
                "page_size": st.sampled_from([3, 4]),
                "max_batch": st.integers(1, 4),
                "seats": st.sampled_from([None, 2, 4]),
                "pends": st.booleans(),
                "growth": st.sampled_from([0.01, 0.7]),
                "rope_switches": st.sampled_from([(), (4,), (13,), (4, 6, 9, 13, 14)]),
                "prefill_block": st.sampled_from([1, 3]),
            }
        ),
        chunk=st.integers(1, 30),
        greedy=st.booleans(),
        speculate=st.sampled_from(["off", "ngram", "draft"]),
        memory=st.sampled_from([0, 2]),
        wrong=st.sampled_from([0, 30, 100]),
    )
    def begin(self, shape: dict[str, Any], chunk: int, greedy: bool, speculate: str, memory: int, wrong: int) -> None:
        self.fault: Exception | None = None
        self.faults: list[Exception] = []
        self.countdown = 0
        self.preset = build({}, "greedy") if greedy else build({"top_k": 20}, None)
        clock = FakeClock()
        alike: dict[str, Any] = {"spread": 0.0 if greedy else 2.0, "memory": memory, "clock": clock, "fail": self.fail}
        self.forward = FakeForward(**shape, **alike)
        # Of another shape, so that nothing depends on both being alike.
        small = FakeForward(pages=6, page_size=5, max_batch=2, max_tokens=3, seconds=0.1, wrong=wrong, **alike)
        self.draft = DraftModel(small, 97, 25, chunk=chunk, clock=clock) if speculate == "draft" else None
        drafter = PromptLookup(3) if speculate == "ngram" else self.draft
        self.scheduler = Scheduler(self.forward, sampler_for, drafter=drafter, chunk=chunk, clock=clock)
        self.batch = Batch(self.scheduler)
        self.streams: list[Stream] = []
        self.texts: list[list[int]] = []

    def fail(self, what: str) -> None:
        if self.fault is not None:
            self.countdown -= 1
            if self.countdown < 0:
                fault, self.fault = self.fault, None
                self.faults.append(fault)
                raise fault

    def start(self, ids: list[int], limit: int, stop: int, seed: int) -> None:
        request = Request(ids, self.preset, limit, seed, stop_ids=frozenset({stop}))
        if len(ids) + limit - 1 > self.forward.pages * self.forward.page_size:
            return
        expected = self.forward.expected(request, limit)
        self.streams.append(Stream(self.batch.steps(request, limit), expected, ids))

    @rule(ids=prompts, limit=st.integers(1, 30), stop=st.integers(0, 96), seed=st.integers(0, 3))
    def ask(self, ids: list[int], limit: int, stop: int, seed: int) -> None:
        self.start(ids, limit, stop, seed)

    @rule(index=st.integers(0, 99), cut=st.integers(0, 3), rest=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def go_on(self, index: int, cut: int, rest: list[int]) -> None:
        """A conversation's next turn, or a retry."""
        if self.texts:
            text = self.texts[index % len(self.texts)]
            self.start([*text[: len(text) - cut], *rest], 9, 96, 0)

    @rule(index=st.integers(0, 99), ahead=st.integers(0, 3), rest=st.lists(st.integers(0, 1), max_size=2))
    def fork(self, index: int, ahead: int, rest: list[int]) -> None:
        """What a stream has so far, and what it is about to say."""
        if self.streams:
            stream = self.streams[index % len(self.streams)]
            self.start([*stream.ids, *stream.expected[: len(stream.tokens) + ahead], *rest], 5, 96, 0)

    @rule(rounds=st.integers(1, 9))
    def pull_all(self, rounds: int) -> None:
        for _ in range(rounds):
            for stream in [*self.streams]:
                self.pull_one(stream)

    @rule(index=st.integers(0, 99), pulls=st.integers(1, 5))
    def pull(self, index: int, pulls: int) -> None:
        for _ in range(pulls):
            if self.streams:
                self.pull_one(self.streams[index % len(self.streams)])

    def pull_one(self, stream: Stream) -> None:
        try:
            step = next(stream.steps)
        except StopIteration:
            assert stream.tokens == stream.expected
            self.streams.remove(stream)
            self.texts.append([*stream.ids, *stream.tokens])
        except BrokenError as error:
            if error not in self.faults:
                raise
            self.streams.remove(stream)
        else:
            stream.tokens += step.token_ids
            stream.prompt_seconds += step.prompt_seconds is not None
            assert stream.prompt_seconds <= 1
            assert stream.prompt_seconds or not stream.tokens
            assert stream.tokens == stream.expected[: len(stream.tokens)]

    @rule(index=st.integers(0, 99))
    def close(self, index: int) -> None:
        if self.streams:
            stream = self.streams.pop(index % len(self.streams))
            stream.steps.close()
            self.texts.append([*stream.ids, *stream.tokens])

    @rule(countdown=st.integers(0, 4))
    def break_soon(self, countdown: int) -> None:
        self.fault, self.countdown = BrokenError(), countdown

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "streams") and not any(stream.steps.gi_running for stream in self.streams):
            begun = [stream for stream in self.streams if stream.steps.gi_frame and stream.steps.gi_frame.f_lasti > 0]
            assert begun or self.leased() == 0

    def teardown(self) -> None:
        if not hasattr(self, "streams"):
            return
        self.fault = None
        for _ in range(1000):
            for stream in [*self.streams]:
                self.pull_one(stream)
        assert not self.streams, "some never finish"
        assert self.leased() == 0

    def leased(self) -> int:
        return self.scheduler.num_allocated_pages + (self.draft.num_allocated_pages if self.draft else 0)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
