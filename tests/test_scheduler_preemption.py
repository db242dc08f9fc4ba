"""Preemption when pages run out: sequences are put back and resumed without changing the text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakeforward import FakeForward, sampler_for
from helpers import respond
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import Batch, Model, ask, pull

from exl_cli.engines.base import Chunk, Request, TokenLogprobs
from exl_cli.engines.exllamav2.draft_model import DraftModel
from exl_cli.engines.exllamav2.prompt_lookup import PromptLookup
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.response import Step
from exl_cli.engines.sampling.sampler import Samplers
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

SETTINGS = [
    build({}, "greedy"),
    build({"top_k": 20, "token_repetition_penalty": 1.2, "token_frequency_penalty": 0.3}, None),
    build({"top_k": 20, "mirostat": True}, None),
    build({"top_k": 20, "dry_multiplier": 0.8, "dry_base": 1.8, "xtc_probability": 0.3}, None),
]
ids = st.integers(300, 303)
requests = st.builds(
    Request,
    st.lists(ids, min_size=1, max_size=25),
    st.sampled_from(SETTINGS),
    st.integers(0, 30),
    st.integers(0, 9),
    stop_strings=st.sampled_from([(), ("a",), ("th", "zz")]),
    banned_strings=st.sampled_from([(), ("he", "an")]),
    logprobs=st.sampled_from([None, 1]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    cache_salt=st.sampled_from(["", "", "salt"]),
)


@pytest.fixture(scope="module")
def tokenizer(exl2_dir: Path) -> Tokenizer:
    return Tokenizer(exl2_dir)


def needed(request: Request) -> int:
    """Pages of four positions that a request may come to need."""
    return -(-(len(request.ids) + request.max_new_tokens - 1) // 4)


def answers(tokenizer: Tokenizer, asked: Sequence[Request], pages: int, speculate: str, **options: Any) -> list[Any]:
    """What consumers get, all asking at once: the texts, tokens, log-probabilities and reasons of the ends."""
    alike: dict[str, Any] = {"vocab_size": 400, "spread": 4.0, "memory": 2}
    forward = FakeForward(pages=pages, max_batch=8, max_tokens=16, **alike, **options)
    samplers = Samplers(tokenizer, forward.vocab_size)
    small = FakeForward(pages=pages // 2 + 1, page_size=5, wrong=20, seconds=0.1, **alike)
    draft = DraftModel(small, forward.vocab_size, 50) if speculate == "draft" else None
    drafter = PromptLookup(3) if speculate == "ngram" else draft
    scheduler = Scheduler(
        forward,
        samplers.make,
        outputs=samplers.outputs,
        score=samplers.prompt_logprobs,
        drafter=drafter,
        chunk=7,
        chunk_beside_decode=5,
        clock=forward.clock,
    )
    batch = Batch(scheduler)
    streams = [
        respond(request, tokenizer.decode_stream(request.ids), 1000, batch.steps(request, request.max_new_tokens))
        for request in asked
    ]
    chunks: list[list[Chunk]] = [[] for _ in asked]
    going = [*zip(streams, chunks, strict=True)]
    for _ in range(2000):
        for stream, its in going:
            its += itertools.islice(stream, 1)
        going = [(stream, its) for stream, its in going if not its[-1].summary]
    assert not going
    for stream in streams:
        stream.close()
    assert scheduler.num_allocated_pages == 0
    assert draft is None or draft.num_allocated_pages == 0
    return [
        (
            "".join(chunk.text for chunk in its),
            [token for chunk in its for token in chunk.token_ids],
            [logprob for chunk in its for logprob in chunk.logprobs],
            [logprob for chunk in its for logprob in chunk.prompt_logprobs],
            its[-1].summary and its[-1].summary.finish_reason,
        )
        for its in chunks
    ]


@settings(max_examples=12, deadline=None)
@given(
    asked=st.lists(requests, min_size=2, max_size=6),
    speculate=st.sampled_from(["off", "ngram", "draft"]),
    rope_switches=st.sampled_from([(), (13,), (4, 20, 33)]),
)
def test_a_quarter_of_the_pages_gives_the_same_answers(
    tokenizer: Tokenizer, asked: list[Request], speculate: str, rope_switches: tuple[int, ...]
) -> None:
    pages = [needed(request) for request in asked]
    few = max(sum(pages) // 4, *pages, 1)
    small = answers(tokenizer, asked, few, speculate, rope_switches=rope_switches)
    assert small == answers(tokenizer, asked, sum(pages) + len(asked), "off", rope_switches=rope_switches)


@pytest.mark.parametrize("rope_switches", [(), (30, 50)], ids=["", "rope switches"])
def test_all_sequences_finish_and_the_first_never_waits(rope_switches: tuple[int, ...]) -> None:
    model = Model(pages=20, max_batch=8, chunk=6, rope_switches=rope_switches)
    asked = [ask(range(begin, begin + 9), 50) for begin in range(0, 80, 10)]  # 15 pages each
    for number, request in enumerate(asked):
        model.scheduler.add(number, request, 50)
    tokens: list[list[int]] = [[] for _ in asked]
    gained, ended = [], []
    while len(ended) < len(asked):
        before = len(tokens[0])
        for number, step in model.scheduler.step():
            if step is None:
                ended.append(number)
                continue
            assert isinstance(step, Step)
            tokens[number] += step.token_ids
        gained.append(len(tokens[0]) - before)
    assert tokens == [model.expected(request) for request in asked]
    assert ended == sorted(ended)
    assert max(map(len, model.forward.rows)) >= 4, "each for itself would have needed as many pages as there are"
    if not rope_switches:
        first = gained.index(1)
        assert gained == [0] * first + [1] * 50 + [0] * (len(gained) - first - 50)
    assert model.scheduler.num_allocated_pages == 0


def test_a_preempted_sequence_finds_its_pages_again() -> None:
    model = Model(pages=12)
    long, late = ask(range(12), 30), ask(range(40, 60), 20)
    first, second = model.steps(long), model.steps(late)
    pull(first)
    tokens = [*pull(second).token_ids]
    while model.scheduler.num_allocated_pages < 12:
        next(first)
        tokens += next(second).token_ids
    for _ in range(5):
        next(first)
    assert model.forward.rows[-1] == [1], "the second waits"
    first.close()
    before, left = model.forward.computed, 20 - len(tokens)
    tokens += [token for step in second for token in step.token_ids]
    assert tokens == model.expected(late)
    # The two pages that the first took in the end, and the page that was not full.
    assert left <= model.forward.computed - before <= left + 3 * 4


def test_a_sequence_recomputed_at_a_rope_switch_preempts_younger_ones() -> None:
    model = Model(pages=20, chunk_beside_decode=2, rope_switches=(15,))
    asked = [ask(range(12), 30), ask(range(20, 40), 30), ask(range(40, 69), 30)]
    for number, request in enumerate(asked):
        model.scheduler.add(number, request, 30)
    tokens: list[list[int]] = [[], [], []]
    steps_without = 0
    while any(len(its) < 30 for its in tokens):
        before = len(tokens[0])
        for number, step in model.scheduler.step():
            tokens[number] += step.token_ids if isinstance(step, Step) else ()
        steps_without += 0 < before == len(tokens[0]) < 30
    assert tokens == [model.expected(request) for request in asked]
    assert steps_without <= 8, "what it is computed again in, two tokens a step"


def test_a_preempted_prompt_is_scored_once() -> None:
    model = Model(pages=12)
    scored: list[tuple[int, int]] = []

    def score(request: Request, begin: int, logits: Any) -> list[TokenLogprobs]:
        scored.append((begin, len(logits)))
        return [TokenLogprobs(begin + at, 0.0) for at in range(len(logits))]

    scheduler = Scheduler(model.forward, sampler_for, score=score, chunk_beside_decode=4, clock=model.clock)
    batch = Batch(scheduler)
    first = batch.steps(ask(range(11), 30), 30)
    pull(first)
    second = batch.steps(ask(range(40, 69), 3, prompt_logprobs=0), 3)
    steps = [step for step in second if step.token_ids or step.prompt_logprobs]
    assert [it.token_id for it in steps[0].prompt_logprobs] == [*range(28)]
    assert [begin for begin, _ in scored].count(0) > 1, "begun, put back, begun again"


def test_a_request_waiting_behind_a_cancelled_one_starts() -> None:
    model = Model(pages=12, seats=4, pends=True)
    model.forward.sampler.fails = 0
    asked = [ask(range(12), 30), ask(range(20, 58), 3), ask(range(60, 64), 3)]
    for number, request in enumerate(asked):
        model.scheduler.add(number, request, request.max_new_tokens)
    begun = {number for _ in range(9) for number, _ in model.scheduler.step()}
    assert begun == {0}
    model.scheduler.cancel(1)
    assert 2 in {number for _ in range(9) for number, _ in model.scheduler.step()}


def test_prefill_chunks_are_smaller_while_others_decode() -> None:
    model = Model(chunk=20, chunk_beside_decode=6, pages=40)
    talking = model.steps(ask(range(30), 20))
    pull(talking)
    assert model.forward.calls[:4] == ["prefill", "synchronize", "prefill", "synchronize"]
    late = model.steps(ask(range(40, 61), 3))
    waited = 0
    while next(late).prompt_seconds is None:
        waited += len(next(talking).token_ids)
    assert waited == 4, "20 tokens, 6 at a time"
