"""The scheduler on a model that detects paging errors: order of work, failures."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakeforward import FakeForward
from helpers import respond
from scheduling import Batch, Model, ask, pull

from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.response import Step
from exl_cli.engines.sampling.sampler import Samplers
from exl_cli.errors import PromptError
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build


def test_a_conversation_is_computed_once() -> None:
    for length in range(1, 14):
        model = Model()
        first = ask(range(20, 20 + length), 7)
        tokens, reused = model.run(first)
        # The last new token is chosen, not computed.
        assert (reused, model.forward.computed) == (0, length + 6)
        second = ask([*first.ids, *tokens, 1, 2], 3)
        assert model.run(second)[1] == length + 6
        assert model.forward.computed == length + 6 + 3 + 2
        assert model.forward.copies == 0
        assert model.run(second)[1] == len(second.ids) - 1


def test_the_next_pass_is_submitted_before_a_token_is_returned() -> None:
    model = Model()
    stream = model.steps(ask(range(6), 3))
    seen = []
    for step in stream:
        seen.append((len(step.token_ids), model.forward.calls[-1]))
    assert seen == [(0, "submit"), (1, "submit"), (1, "submit"), (1, "collect")]
    assert model.forward.calls[:3] == ["prefill", "synchronize", "submit"]


def test_interleaved_streams_share_forward_passes() -> None:
    model = Model(pages=40)
    requests = [ask(range(begin, begin + 9), 8, build({"top_k": 9}, None), seed=begin) for begin in (0, 30, 60)]
    streams = [model.steps(request) for request in requests]
    found: list[list[int]] = [[], [], []]
    for _ in range(12):
        for stream, tokens in zip(streams, found, strict=True):
            tokens += next(stream, Step()).token_ids
    assert found == [model.expected(request) for request in requests]
    assert model.forward.rows.count([1, 1, 1]) >= 5


def test_a_long_prompt_does_not_stall_decoding() -> None:
    model = Model(chunk=5, pages=40)
    talking = model.steps(ask(range(4), 20))
    pull(talking)
    late = model.steps(ask(range(30, 61), 3))
    next(late)
    while next(late).prompt_seconds is None:
        assert len(next(talking).token_ids) == 1
    # 30 tokens in chunks of 5, a pass of the other between each two.
    calls = model.forward.calls[model.forward.calls.index("collect") :]
    assert calls.count("prefill") == 6
    assert "synchronize" not in calls, "the others' passes are waited for anyway"
    assert "prefill prefill" not in " ".join(calls)


def test_concurrent_requests_reuse_the_first_ones_prefix() -> None:
    model = Model(pages=40, max_batch=4)
    shared = [*range(40, 53)]
    requests = [ask([*shared, number], 4) for number in range(4)]
    for number, request in enumerate(requests):
        model.scheduler.add(number, request, 4)
    assert [(number, step.reused_tokens) for number, step in model.scheduler.step()] == [
        (0, 0),
        (1, 13),
        (2, 13),
        (3, 13),
    ]
    tokens: list[list[int]] = [[], [], [], []]
    while model.scheduler.num_allocated_pages:
        for number, step in model.scheduler.step():
            tokens[number] += step.token_ids if step else ()
    assert tokens == [model.expected(request) for request in requests]


def test_waiting_prompts_share_a_pass() -> None:
    model = Model(pages=40, max_batch=8, chunk=20)
    requests = [ask(range(9 * number, 9 * number + 9), 4) for number in range(4)]
    for number, request in enumerate(requests):
        model.scheduler.add(number, request, 4)
    tokens: list[list[int]] = [[], [], [], []]
    while model.scheduler.num_allocated_pages or not tokens[-1]:
        for number, step in model.scheduler.step():
            tokens[number] += step.token_ids if step else ()
    assert tokens == [model.expected(request) for request in requests]
    # 8, 8 and 4 tokens; then the other 12 beside a decode step.
    assert model.forward.prefilled == [[8, 8, 4], [4, 8]]
    assert model.forward.calls[:4] == ["prefill", "synchronize", "submit", "collect"]


def test_chunks_are_of_whole_blocks() -> None:
    model = Model(pages=60, max_batch=8, chunk=20, prefill_block=8)
    for number in range(4):
        model.scheduler.add(number, ask(range(12 * number, 12 * number + 12), 2), 2)
    for _ in range(6):
        model.scheduler.step()
    # 11 tokens each, which take as long as 16; what is left of a chunk is not worth a block.
    assert model.forward.prefilled == [[11], [11], [11], [11]]
    model.scheduler.add(4, ask(range(50, 90), 2), 2)
    for _ in range(4):
        model.scheduler.step()
    assert model.forward.prefilled[4:] == [[16], [16], [7]]


def test_chunks_beside_decoding_are_as_large_as_a_pause_allows() -> None:
    model = Model(chunk=64, chunk_beside_decode=4, pages=200, seconds=0.001, growth=0.0)
    model.forward.prefill_seconds = 0.001
    talking = model.steps(ask(range(4), 40))
    pull(talking)
    late = model.steps(ask([*range(97)] * 3, 3))
    for _ in range(10):
        next(talking)
        next(late)
        if len(model.forward.prefilled) == 5:
            model.forward.prefill_seconds = 0.01
    # In 60 ms: a step of 4 tokens takes 5 ms, so 48 fit; then 56. Later 56 take 561 ms.
    assert [count for (count,) in model.forward.prefilled[1:8]] == [4, 48, 56, 56, 56, 4, 4]


def test_a_request_waits_for_pages_in_order_of_arrival() -> None:
    model = Model(pages=8)
    first, large, small = ask(range(10), 7), ask(range(20, 36), 9), ask([90], 2)
    running, waiting, behind = (model.steps(request) for request in (first, large, small))
    pull(running)
    assert next(waiting) == next(behind) == Step()
    assert [t for step in running for t in step.token_ids] == model.expected(first)[1:]
    assert model.forward.rows[:7] == [[1]] * 7
    assert [t for step in behind for t in step.token_ids] == model.expected(small)
    assert [t for step in waiting for t in step.token_ids] == model.expected(large)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    model = Model(pages=8)
    assert len(model.run(ask(range(20), 13))[0]) == 13
    with pytest.raises(PromptError, match=r"33 tokens, but the KV cache holds 32"):
        model.run(ask(range(20), 14))
    model.run(ask(range(3)))


def test_prompt_seconds_are_those_of_all_tokens_but_the_last() -> None:
    model = Model(seconds=1.0, growth=0.0)
    model.forward.prefill_seconds = 0.5
    request = ask(range(11), 4)
    step, *_ = model.steps(request)
    assert (step.prompt_seconds, step.reused_tokens) == (5.0, 0)
    assert model.clock.now == 5.0 + 4
    again = next(model.steps(request))
    assert (again.prompt_seconds, again.reused_tokens) == (0.0, 10)


@pytest.mark.parametrize("pulls", range(1, 10))
def test_the_pages_of_a_closed_stream_stay_cached(pulls: int) -> None:
    model = Model(pages=20)
    request = ask(range(9), 20)
    stream = model.steps(request)
    tokens = [token for _ in range(pulls) for token in next(stream).token_ids]
    stream.close()
    again = ask([*request.ids, *model.expected(request)], 3)
    # The pass in flight has the last one handed out, or the prompt's last; it counts for nothing.
    assert model.run(again)[1] == 8 + len(tokens)
    assert model.scheduler.num_allocated_pages == 0


def test_a_consumer_may_cancel_with_a_pass_in_flight(exl2_dir: Path) -> None:
    tokenizer = Tokenizer(exl2_dir)
    forward = FakeForward(pages=40, vocab_size=tokenizer.vocab_size)
    batch = Batch(Scheduler(forward, Samplers(tokenizer, forward.vocab_size).make))

    def stream(request: Request) -> list[int]:
        chunks = respond(request, tokenizer.decode_stream(request.ids), 160, batch.steps(request, 100))
        return [token for chunk in chunks for token in chunk.token_ids]

    request = ask(range(300, 309), 100)
    whole = forward.expected(request, 100)
    stop = tokenizer.decode(whole[:20])[-3:]
    tokens = stream(ask(request.ids, 100, stop_strings=(stop,)))
    assert tokens == whole[: len(tokens)]
    assert len(tokens) <= 20
    passes = forward.calls.count("submit")
    assert passes == len(tokens) + 1, "the pass that was in flight, and none after it"
    request = ask([*request.ids, *tokens, 7], 100)
    assert stream(request) == forward.expected(request, 100)


def test_a_stop_id_ends_it_without_another_pass() -> None:
    model = Model()
    request = ask(range(5), 9)
    stop = model.expected(request)[3]
    tokens, _ = model.run(ask(range(5), 9, stop_ids=frozenset({stop})))
    assert tokens[-1] == stop
    assert model.forward.calls.count("submit") == len(tokens)


def test_the_next_pass_is_submitted_before_the_tokens_of_the_last_one_are_seen() -> None:
    model = Model(seats=4, pends=True, spread=2.0, pages=30)
    model.forward.sampler.fails = 0
    sampling = build({"top_k": 20}, None)
    requests = [ask(range(n, n + 5), 12, sampling, seed=n) for n in (10, 30, 50)]
    streams = [model.steps(request) for request in requests]
    tokens = [[token for step in stream for token in step.token_ids] for stream in streams]
    assert tokens == [model.expected(request) for request in requests]
    assert model.forward.ahead >= 10
    assert model.scheduler.num_allocated_pages == 0
    assert model.forward.sampler.seats == 4


def test_a_sequence_that_has_ended_costs_one_row_of_the_next_pass() -> None:
    model = Model(seats=4, pends=True)
    model.forward.sampler.fails = 0
    whole = model.expected(ask(range(5), 12))
    stop = frozenset({whole[6]})
    tokens, _ = model.run(ask(range(5), 12, stop_ids=stop))
    assert tokens == whole[: whole.index(whole[6]) + 1]
    assert sum(map(len, model.forward.rows)) == len(tokens) + 1


def test_a_token_that_the_device_cannot_sample_is_recomputed_for_the_cpu() -> None:
    model = Model(seats=4, pends=True, spread=2.0)
    model.forward.sampler.fails = 97
    model.run(ask(range(5), 12, build({"top_k": 20}, None), seed=3))
    assert model.forward.ahead == 1
    assert model.forward.sampler.seats == 4
