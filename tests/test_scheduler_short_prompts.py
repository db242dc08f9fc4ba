"""The end of a short prompt and the first token come of one pass, where nothing else is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fakeforward import FakeForward, sampler_for
from helpers import request_for
from scheduling import Model, ask

from exl_cli.engines import driver
from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.batching import Batch
from exl_cli.engines.exllamav2.ngrams import Ngrams
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.errors import EngineError
from exl_cli.sampling import Sampling, build


def alike(**options: object) -> Model:
    """Passes of the size that those on a GPU have."""
    return Model(**{"page_size": 32, "pages": 20, "max_tokens": 32, "joins": True, "spread": 2.0, **options})


def computed(model: Model) -> tuple[list[int], list[list[int]]]:
    """What `prefill` was given, and the passes with logits, since last asked."""
    found = ([*model.forward.prefilled], [*model.forward.rows])
    model.forward.prefilled.clear()
    model.forward.rows.clear()
    return found


@pytest.mark.parametrize(
    ("length", "before", "last"),
    [
        (1, [], 1),
        (2, [], 2),
        (32, [], 32),
        (33, [32], 1),
        (66, [64], 2),
        (96, [64], 32),
        (97, [96], 1),
        (130, [128], 2),
    ],
)
@pytest.mark.parametrize("sampling", [build({}, "greedy"), build({"top_k": 9}, None)])
def test_the_last_pass_over_a_prompt_gives_the_first_token(
    length: int, before: list[int], last: int, sampling: Sampling
) -> None:
    model = alike()
    first = ask(range(length), 4, sampling)
    tokens, _ = model.run(first)
    assert computed(model) == (before, [[last], [1], [1], [1]])
    # The next turn finds all of it, but for what the pass takes along from its last multiple of 32 on.
    second = ask([*first.ids, *tokens, 1, 2, 3], 2, sampling)
    known, begin = length + 3, (length + 6) // 32 * 32
    text, reused = model.run(second)
    assert reused == min(known, begin)
    prefilled = [begin - known] if begin > known else []
    assert computed(model) == (prefilled, [[len(second.ids) - begin], [1]])
    assert model.forward.computed == length + 3 + len(second.ids) - reused + 1
    assert model.forward.copies == 0
    # Once more, the same tokens are computed in the same pass.
    assert model.run(second) == (text, begin)
    assert computed(model) == ([], [[len(second.ids) - begin], [1]])


@pytest.mark.parametrize(("limit", "passes"), [(1, [[7]]), (3, [[7], [1], [1]])])
def test_it_ends_where_it_should(limit: int, passes: list[list[int]]) -> None:
    model = alike(pages=1)  # which the longest of these fills
    request = ask(range(7), limit)
    model.run(request)
    assert computed(model)[1] == passes
    stopped = ask(range(7), 9, stop_ids=frozenset(model.expected(request)[:1]))
    assert len(model.run(stopped)[0]) == 1
    model = alike(pages=1)
    assert len(model.run(ask(range(14), 3))[0]) == 3
    model.run(ask(range(16), 1))
    assert model.scheduler.leased_pages == 0


def test_what_is_left_of_a_long_prompt_is_a_short_one() -> None:
    model = alike(chunk=100)
    model.run(ask(range(150), 2))
    assert computed(model) == ([100, 28], [[22], [1]])
    model = alike(chunk=40)
    model.run(ask(range(66), 2))
    assert computed(model) == ([40, 24], [[2], [1]])


def test_beside_others_the_last_token_has_a_pass_of_its_own() -> None:
    model = alike()
    requests = [ask(range(begin, begin + 20), 6) for begin in (0, 30, 60)]
    sequences = [model.scheduler.sequence(request, 6) for request in requests]
    for sequence in sequences[:2]:
        model.scheduler.add(sequence)
    for _ in range(3):
        model.scheduler.step()
    # And one that comes while they generate.
    model.scheduler.add(sequences[2])
    while model.scheduler.leased_pages:
        model.scheduler.step()
    prefilled, passes = computed(model)
    # Behind the first one waits another; beside the second, and the third, others generate.
    assert prefilled == [19, 19, 19]
    assert {count for one in passes for count in one} == {1}
    for sequence, request in zip(sequences, requests, strict=True):
        assert [t for step in sequence.outbox for t in step.token_ids] == model.expected(request)


def test_one_that_comes_during_that_pass_joins_after_it() -> None:
    model = alike()
    one, two = ask(range(20), 6), ask(range(40, 60), 6)
    first, second = model.steps(one), model.steps(two)
    assert next(first) == Step()
    assert model.forward.calls[-1] == "submit"
    tokens = [t for step in second for t in step.token_ids]
    assert tokens == model.expected(two)
    assert [t for step in first for t in step.token_ids] == model.expected(one)
    prefilled, passes = computed(model)
    assert prefilled == [19]
    assert passes[:3] == [[20], [1], [1, 1]]


def test_a_drafter_is_told_of_the_prompt_first() -> None:
    model = alike(drafter=Ngrams())
    model.run(ask(range(20), 6))
    prefilled, passes = computed(model)
    assert (prefilled, passes[0]) == ([19], [1])


def test_the_prompts_time_comes_before_the_first_token_and_that_pass_is_part_of_it() -> None:
    model = alike(seconds=1.0, growth=0.0)
    model.forward.prefill_seconds = 0.5
    request = ask(range(66), 3)
    steps = [step for step in model.steps(request) if step != Step()]
    assert steps[0] == Step((), 33.0, 0, shared_seconds=1.0)
    assert [len(step.token_ids) for step in steps] == [0, 1, 1, 1]
    assert [step.prompt_seconds for step in steps[1:]] == [None] * 3
    assert model.clock.now == 33.0 + 2
    # The second time that pass is all there is.
    again = [step for step in model.steps(request) if step != Step()]
    assert again[0] == Step((), 1.0, 64, shared_seconds=1.0)


def test_a_pass_that_is_part_of_both_counts_for_both() -> None:
    class Decoder:
        def push(self, token_id: int) -> str:
            return str(token_id)

    def steps() -> Iterator[Step]:
        yield Step((), prompt_seconds=100.0, shared_seconds=100.0)
        yield Step((5,))

    *_, last = driver.run(request_for([1, 2], "greedy", 1), Decoder(), 10, steps())
    assert last.summary.prompt_seconds == 100.0
    assert 0 < last.summary.generation_seconds < 50


def test_a_stream_closed_during_that_pass_leaves_what_was_computed_before() -> None:
    model = alike()
    request = ask(range(66), 6)
    stream = model.steps(request)
    assert next(stream) == Step()
    assert model.forward.rows == [[2]]
    assert model.scheduler.leased_pages == 3
    stream.close()
    assert model.scheduler.leased_pages == 0
    other = ask([*range(40, 70)], 4)
    assert model.run(other)[1] == 0
    assert model.run(request)[1] == 64


@pytest.mark.parametrize("what", ["submit", "collect"])
def test_a_failure_of_that_pass_is_the_requests_and_the_next_one_works(what: str) -> None:
    broken = True

    def fail(name: str) -> None:
        if broken and name == what:
            raise RuntimeError("out of memory")

    model = alike(fail=fail)
    request = ask(range(66), 6)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.steps(request))
    assert model.scheduler.leased_pages == 0
    broken = False
    assert model.run(request)[1] == 64


def test_the_model_may_be_closed_during_that_pass() -> None:
    model = alike()
    stream = model.steps(ask(range(20), 6))
    next(stream)
    with model.batch.exclusive() as scheduler:
        scheduler.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    assert model.run(ask(range(20), 6))[1] == 0


def test_logits_that_are_no_numbers_leave_the_prompt_in_the_cache() -> None:
    class Broken(FakeForward):
        broken = True

        def collect(self) -> torch.Tensor:
            logits = super().collect()
            return logits.fill_(float("nan")) if self.broken else logits

    forward = Broken(joins=True, max_tokens=32)
    batch = Batch(Scheduler(forward, sampler_for))
    request = ask(range(20), 6)
    with pytest.raises(EngineError, match="NaN"):
        list(batch.steps(request, 6))
    forward.broken = False
    steps = [*batch.steps(request, 6)]
    assert sum(step.reused_tokens for step in steps) == 16
    assert [t for step in steps for t in step.token_ids] == forward.expected(request, 6)
