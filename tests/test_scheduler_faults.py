"""Passes that fail, threads, interruptions: what the scheduler makes of them, and that the next request works."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from fakeforward import FakeForward, interrupt_after, sampler_for
from scheduling import Model, ask, pull

from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.batching import Batch
from exl_cli.engines.exllamav2.draft_model import DraftModel
from exl_cli.engines.exllamav2.prompt_lookup import Ngrams
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.errors import EngineError
from exl_cli.sampling import build


@pytest.mark.parametrize("what", ["prefill", "synchronize", "submit", "collect", "copy"])
@pytest.mark.parametrize("when", range(4))
def test_a_pass_that_fails_ends_those_in_it_and_nothing_else(what: str, when: int) -> None:
    left = when

    def fail(name: str) -> None:
        nonlocal left
        if name == what:
            left -= 1
            if left == -1:
                raise RuntimeError("out of memory")

    model = Model(pages=20, max_batch=2, chunk=4, fail=fail)
    requests = [ask(range(9), 6), ask([*range(7), 50, 51, 52], 6), ask(range(60, 66), 6)]
    streams = [model.steps(request) for request in requests]
    found: list[list[int]] = [[], [], []]
    failed = set()
    for _ in range(40):
        for index, stream in enumerate(streams):
            try:
                found[index] += next(stream, Step()).token_ids
            except RuntimeError as error:
                assert str(error) == "out of memory"  # noqa: PT017 - which of them get it is what is to be seen
                failed.add(index)
    for index, request in enumerate(requests):
        whole = model.expected(request)
        assert found[index] == (whole[: len(found[index])] if index in failed else whole)
    assert len(failed) <= 2
    assert failed or left >= 0
    assert model.scheduler.leased_pages == 0
    left = -2  # nothing fails any more
    for request in requests:
        model.run(request)


def test_a_request_that_cannot_begin_is_told_why() -> None:
    def fail(what: str) -> None:
        if what == "copy":
            raise RuntimeError("no copies")

    model = Model(pages=20, fail=fail)
    running = model.steps(ask(range(6), 9))
    pull(running)
    with pytest.raises(RuntimeError, match="no copies"):
        list(model.steps(ask([*range(5), 60], 3)))
    assert model.scheduler.leased_pages == 0


def test_logits_that_are_no_numbers_end_only_their_own_sequence() -> None:
    class Broken(FakeForward):
        def collect(self) -> torch.Tensor:
            logits = super().collect()
            logits[0] = float("nan") if len(logits) > 1 else logits[0]
            return logits

    forward = Broken(pages=20)
    batch = Batch(Scheduler(forward, sampler_for))
    one, two = ask(range(5), 6), ask(range(30, 35), 6)
    first, second = batch.steps(one, 6), batch.steps(two, 6)
    pull(first)
    pull(second, lambda step: step.prompt_seconds is not None)
    with pytest.raises(EngineError, match="NaN"):
        list(first)
    assert [t for step in second for t in step.token_ids] == forward.expected(two, 6)


def test_closing_the_model_ends_all_streams() -> None:
    model = Model()
    stream, waiting = model.steps(ask(range(5))), model.steps(ask(range(70, 75), 50))
    pull(stream)
    next(waiting)
    with model.batch.exclusive() as scheduler:
        scheduler.close()
    for one in (stream, waiting):
        with pytest.raises(EngineError, match="closed"):
            list(one)
    assert model.run(ask(range(5)))[1] == 0


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_threads")
def test_several_threads_stream_at_once() -> None:
    model = Model(pages=100, max_batch=6, spread=2.0)
    sampling = build({"top_k": 9}, None)
    requests = [ask(range(number % 3, 6 + number), 25, sampling, seed=number) for number in range(10)]
    expected = [model.expected(request) for request in requests]
    found: dict[int, list[int]] = {}
    streams = [model.steps(request) for request in requests]
    together = threading.Barrier(len(requests))
    # One is under way before: so there is somebody to share a pass with, however the threads' turns come.
    begun = next(streams[0])

    def consume(number: int) -> None:
        together.wait(timeout=20)
        found[number] = [t for step in streams[number] for t in step.token_ids]

    threads = [threading.Thread(target=consume, args=(number,), daemon=True) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    found[0] = [*begun.token_ids, *found[0]]
    assert [found[number] for number in range(len(requests))] == expected
    assert model.scheduler.leased_pages == 0
    assert max(len(row) for row in model.forward.rows) > 1


def test_a_stream_is_closed_while_another_thread_is_in_a_step() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(what: str) -> None:
        if what == "collect" and threading.current_thread() is thread:
            inside.set()
            assert go_on.wait(timeout=20)

    model = Model(pages=40, fail=hold)
    one, two = ask(range(5), 6), ask(range(30, 35), 6)
    first, second = model.steps(one), model.steps(two)
    tokens: list[int] = []
    thread = threading.Thread(target=lambda: tokens.extend(t for step in first for t in step.token_ids), daemon=True)
    pull(second)
    thread.start()
    assert inside.wait(timeout=20)
    second.close()
    go_on.set()
    thread.join(timeout=20)
    assert tokens == model.expected(one)
    assert model.scheduler.leased_pages == 0


@pytest.mark.parametrize("begin", range(0, 30000, 3000))
@pytest.mark.parametrize("kind", ["plain", "ngram", "draft"])
def test_an_interruption_may_come_anywhere(begin: int, kind: str) -> None:
    for opcodes in range(begin + 7, begin + 3000, 1301):
        small = FakeForward(pages=20)
        drafters = {"plain": None, "ngram": Ngrams(), "draft": DraftModel(small, 97, 99)}
        model = Model(pages=10, max_batch=2, chunk=5, drafter=drafters[kind])
        requests = [ask(range(9), 6), ask([*range(6), 20, 21], 7), ask(range(3), 5)]
        streams = [model.steps(request) for request in requests]
        found: list[list[int]] = [[], [], []]
        try:
            with interrupt_after(opcodes):
                for _ in range(8):
                    for stream, tokens in zip(streams, found, strict=True):
                        tokens += next(stream, Step()).token_ids
        except KeyboardInterrupt:
            pass
        for stream, tokens, request in zip(streams, found, requests, strict=True):
            try:
                for step in stream:
                    tokens += step.token_ids
            except EngineError as error:
                assert "interrupted" in str(error)  # noqa: PT017 - it may also go on
            assert tokens == model.expected(request)[: len(tokens)]
        assert model.scheduler.leased_pages == 0
        for request in requests:
            model.run(request)
        assert model.scheduler.leased_pages == 0
