"""Speculative decoding: the same text in fewer passes, and disabled when it does not pay."""

from __future__ import annotations

from typing import Any

import pytest
from fakeforward import FakeClock, FakeForward, sampler_for
from helpers import respond
from scheduling import Batch

from exl_cli.engines.base import Request, Summary
from exl_cli.engines.exllamav2.draft_length import (
    AcceptanceEstimate,
    AcceptanceRate,
    DraftLength,
    SpeculationStatistics,
)
from exl_cli.engines.exllamav2.draft_model import DraftModel
from exl_cli.engines.exllamav2.prompt_lookup import PromptLookup
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.exllamav2.speculation import Drafter, DraftRequest
from exl_cli.engines.response import Step
from exl_cli.errors import param, spell
from exl_cli.sampling import Sampling, build

GREEDY = build({}, "greedy")


def ask(ids: list[int], new: int, sampling: Sampling = GREEDY, **rest: Any) -> Request:
    return Request(ids, sampling, new, 3, **rest)


class SilentDecoder:
    """Decodes nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def special(self, token_id: int) -> str:
        return ""


# A model that knows 20 tokens and looks at two of them soon repeats itself, also where it is sampled from.
REPEATING = {"memory": 2, "vocab_size": 20}


class Model:
    """A model that speculates, or not."""

    def __init__(self, speculate: str = "off", *, wrong: int = 0, draft_seconds: float = 0.1, **options: Any) -> None:
        clock = FakeClock()
        alike = {name: options.pop(name) for name in ("spread", "memory", "vocab_size") if name in options}
        self.forward = FakeForward(clock=clock, **{"pages": 200, "max_tokens": 16, **options, **alike})
        self.draft = FakeForward(pages=200, seconds=draft_seconds, wrong=wrong, clock=clock, **alike)
        self.clock = clock
        drafters: dict[str, Drafter | None] = {
            "off": None,
            "ngram": PromptLookup(),
            "draft": DraftModel(self.draft, 97, 10_000, clock=clock),
        }
        self.drafter = drafters[speculate]
        self.batch = Batch(Scheduler(self.forward, sampler_for, drafter=self.drafter, clock=clock))

    def run(self, request: Request) -> tuple[list[int], Summary]:
        steps = self.batch.steps(request, request.max_new_tokens)
        chunks = [*respond(request, SilentDecoder(), 100_000, steps)]
        summary = chunks[-1].summary
        assert summary is not None
        return [token for chunk in chunks for token in chunk.token_ids], summary

    @property
    def passes(self) -> int:
        return self.forward.calls.count("submit")


@pytest.mark.parametrize("sampling", [GREEDY, build({"top_k": 5, "mirostat": True}, None)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_the_text_is_the_same_as_without_speculation(kind: str, sampling: Sampling) -> None:
    model = Model(kind, spread=0.0 if sampling.greedy else 9.0, wrong=20, **REPEATING)
    for begin in range(5):
        request = ask([begin, 40, 41, 42, begin], 120, sampling)
        tokens, summary = model.run(request)
        assert tokens == model.forward.expected(request, 120)
        assert summary.new_tokens == 120
        assert 0 <= summary.accepted_tokens <= summary.drafted_tokens
        assert model.forward.reached <= len(request.ids) + 119
    assert model.passes < 5 * 100


def test_repeating_text_takes_few_passes() -> None:
    model, plain = Model("ngram", **REPEATING), Model(**REPEATING)
    request = ask([1, 2, 3], 400)
    tokens, summary = model.run(request)
    assert tokens == plain.run(request)[0]
    assert model.passes < plain.passes / 4
    assert model.clock.now < plain.clock.now / 2
    assert summary.accepted_tokens == 400 - model.passes
    assert summary.accepted_tokens > 0.9 * summary.drafted_tokens
    assert summary.note == ""


def test_a_good_draft_model_saves_passes_and_time() -> None:
    model, plain = Model("draft", wrong=10), Model()
    request = ask([1, 2, 3], 400)
    tokens, summary = model.run(request)
    assert tokens == plain.run(request)[0]
    assert model.clock.now < 0.6 * plain.clock.now
    assert 0.7 < summary.accepted_tokens / summary.drafted_tokens < 0.95
    assert summary.note == ""


def test_a_bad_draft_model_is_rarely_used_and_reported() -> None:
    model, plain = Model("draft", wrong=100), Model()
    request = ask([1, 2, 3], 300)
    tokens, summary = model.run(request)
    assert tokens == plain.run(request)[0]
    assert summary.drafted_tokens < 60
    assert model.clock.now < 1.1 * plain.clock.now
    assert spell(summary.note).startswith("draft made this ")
    assert f"slower: {summary.accepted_tokens} of {summary.drafted_tokens} draft tokens were accepted" in summary.note


def test_a_draft_model_as_slow_as_the_model_is_not_used() -> None:
    model = Model("draft", draft_seconds=2.0)
    summary = model.run(ask([1, 2, 3], 300))[1]
    assert 0 < summary.drafted_tokens < 30


def test_without_batching_gains_nothing_is_drafted() -> None:
    model, plain = Model("ngram", growth=1000.0, **REPEATING), Model(growth=1000.0, **REPEATING)
    for begin in range(3):
        summary = model.run(ask([begin, 2, 3], 200))[1]
        plain.run(ask([begin, 2, 3], 200))
        assert summary.note == ""
    assert model.clock.now < 1.05 * plain.clock.now


def test_the_draft_model_keeps_step_and_its_own_conversation() -> None:
    model = Model("draft", wrong=30)
    first = ask(list(range(20)), 50)
    tokens, _ = model.run(first)
    second = ask([*first.ids, *tokens, 1, 2, 3], 1)
    before = model.draft.computed
    model.run(second)
    assert model.draft.computed == before, "of one new token nothing can be proposed, so the draft is left out"
    third = ask([*second.ids, 4], 2)
    model.run(third)
    assert model.draft.computed - before <= 6


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_concurrent_sequences_share_the_tokens_of_a_pass(kind: str) -> None:
    model = Model(kind, max_batch=4, max_tokens=12, **REPEATING)
    requests = [ask([begin, 2, 3], 90) for begin in range(3)]
    streams = [model.batch.steps(request, 90) for request in requests]
    found: list[list[int]] = [[], [], []]
    while any(stream.gi_frame for stream in streams):
        for stream, tokens in zip(streams, found, strict=True):
            tokens += next(stream, Step()).token_ids
    assert found == [model.forward.expected(request, 90) for request in requests]
    # Three rows of four tokens, or two of six, are twelve.
    assert max(max(row) for row in model.forward.rows if len(row) == 3) == 4
    assert max(max(row) for row in model.forward.rows if len(row) == 2) <= 6


def test_nothing_is_proposed_beyond_the_drafts_own_context() -> None:
    clock = FakeClock()
    forward, small = FakeForward(pages=100, clock=clock), FakeForward(pages=100, clock=clock, seconds=0.1)
    batch = Batch(Scheduler(forward, sampler_for, drafter=DraftModel(small, 97, 30, clock=clock), clock=clock))
    request = ask([1, 2, 3], 60)
    assert [t for step in batch.steps(request, 60) for t in step.token_ids] == forward.expected(request, 60)
    assert 20 < small.reached <= 30


def proposals(ids: list[int], most: int = 5, **sizes: int) -> tuple[int, ...]:
    """What is proposed to follow a text."""
    ngrams = PromptLookup(**sizes)
    return ngrams.propose([DraftRequest(ngrams.begin(ids, 1000), ids, most)], lambda outlooks, cost: most)[0].tokens


def test_what_followed_the_last_tokens_is_proposed() -> None:
    assert proposals([1, 2, 3, 4, 5, 6, 9, 2, 3]) == (4, 5, 6, 9, 2)
    assert proposals([1, 2, 3, 4, 5, 6, 9, 2, 3], most=2) == (4, 5)
    # The longest match counts, then the last one.
    assert proposals([7, 1, 2, 3, 50, 8, 2, 3, 60, 9, 1, 2, 3], most=1) == (50,)
    assert proposals([1, 2, 50, 1, 2, 60, 1, 2], most=1) == (60,)
    # A period is gone on with.
    assert proposals([5, 6, 7, 5, 6, 7, 5, 6]) == (7, 5, 6, 7, 5)
    assert proposals([4, 4, 4]) == (4, 4, 4, 4, 4)
    # A single token that was there before is no reason.
    assert proposals([1, 2, 3, 9, 3]) == ()
    assert proposals([1, 2, 3, 9, 3], shortest=1) == (9, 3, 9, 3, 9)
    assert proposals([1]) == proposals([1, 1]) == proposals([1, 2, 1, 2], most=0) == ()


def test_the_expected_number_of_tokens_is_leviathans() -> None:
    # Equation 1 of Leviathan et al. 2023: (1 - a^(k+1)) / (1 - a).
    for rate in (0.0, 0.3, 0.9):
        for count in (1, 4, 7):
            assert AcceptanceEstimate(rate, 99).tokens(count) == pytest.approx((1 - rate ** (count + 1)) / (1 - rate))
    assert AcceptanceEstimate(0.9, 2).tokens(7) == AcceptanceEstimate(0.9, 2).tokens(2)


def test_the_number_of_proposals_is_the_fastest() -> None:
    pace = DraftLength()
    assert pace.choose([AcceptanceEstimate(1.0, 9)], 0.0) == 0, "the time of a plain pass is not known"
    for tokens, seconds in ((1, 1.0), (2, 1.1), (3, 1.2), (4, 1.3), (5, 3.0), (6, 3.1), (8, 3.2), (10, 3.4)):
        for _ in range(2):
            pace.note(1, tokens, seconds, seconds)
    # Tokens a second at 0.8: 1.64 with one proposal, 2.03 with two, 2.27 with three, and 1.12 with four.
    assert pace.choose([AcceptanceEstimate(0.8, 9)], 0.0) == 3
    assert pace.choose([AcceptanceEstimate(0.8, 2)], 0.0) == 2
    assert pace.choose([AcceptanceEstimate(0.05, 9)], 0.0) == 0
    assert pace.choose([AcceptanceEstimate(1.0, 9)], 0.0) in (3, 9)
    # A draft that takes as long as a pass is of no use.
    assert pace.choose([AcceptanceEstimate(0.8, 9)], 1.0) == 0


def test_the_first_pass_of_a_shape_and_idle_time_do_not_count() -> None:
    pace = DraftLength()
    pace.note(1, 1, 60.0, 60.0)
    assert pace.seconds(1, 1) == 0.0
    pace.note(1, 1, 1.0, 0.9)
    assert pace.seconds(1, 1) == 1.0
    pace.note(1, 1, 30.0, 0.0)  # nobody waited for it: it may have been done long ago
    assert pace.seconds(1, 1) == 1.0
    for _ in range(40):
        pace.note(1, 1, 2.0, 1.9)
    assert pace.seconds(1, 1) == pytest.approx(2.0, rel=0.01)
    assert pace.seconds(2, 1) == 0.0


def test_a_rate_follows_what_is_seen_and_forgets_it() -> None:
    rate = AcceptanceRate(0.5)
    for _ in range(30):
        assert rate.note([1, 2, 3], [1, 2, 9]) == 2
    assert rate.value == pytest.approx(2 / 3, abs=0.1)
    for _ in range(30):
        rate.note([1], [2])
    low = rate.value
    assert low < 0.15
    for _ in range(500):
        rate.fade()
    assert low < rate.value == pytest.approx(0.5, abs=0.05)


def test_only_a_slowdown_is_reported() -> None:
    assert SpeculationStatistics(10, 2, seconds=1.02, plain_seconds=1.0).note(param("draft")) == ""
    assert SpeculationStatistics(0, 0, seconds=2.0, plain_seconds=1.0).note(param("draft")) == ""
    assert SpeculationStatistics(10, 0, seconds=2.0, plain_seconds=0.0).note(param("draft")) == ""
    text = "draft made this 25% slower: 2 of 10 draft tokens were accepted"
    assert spell(SpeculationStatistics(10, 2, seconds=1.25, plain_seconds=1.0).note(param("draft"))) == text
