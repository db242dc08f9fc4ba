"""Failing forward passes: how the scheduler recovers."""

from __future__ import annotations

import pytest
import torch
from fakeforward import FakeForward, sampler_for
from scheduling import Batch, Model, ask, pull

from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.response import Step
from exl_cli.errors import EngineError


@pytest.mark.parametrize("what", ["prefill", "synchronize", "submit", "collect", "copy"])
@pytest.mark.parametrize("when", range(4))
def test_a_failed_pass_ends_only_its_own_sequences(what: str, when: int) -> None:
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
    assert model.scheduler.num_allocated_pages == 0
    left = -2  # nothing fails any more
    for request in requests:
        model.run(request)


def test_nan_logits_end_only_their_own_sequence() -> None:
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


def test_a_reset_ends_all_requests_and_empties_the_cache() -> None:
    model = Model()
    stream, waiting = model.steps(ask(range(5))), model.steps(ask(range(70, 75), 50))
    pull(stream)
    next(waiting)
    model.scheduler.reset()
    for ended in (stream, waiting):
        with pytest.raises(EngineError, match="asked for logits"):
            list(ended)
    assert model.run(ask(range(5)))[1] == 0
