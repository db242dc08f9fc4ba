"""What a benchmark measures, in which order and with which prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from benchfakes import MS, BatchEngine, PacedEngine, TurnsEngine
from gpu import fast_path

from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench import plan
from exl_cli.bench.measure import measure
from exl_cli.bench.plan import Case, Prompts, Settings
from exl_cli.bench.result import Sample
from exl_cli.engines.base import Chunk, Request
from exl_cli.errors import ExlError, UsageError
from exl_cli.sampling import Sampling


def run(engine: PacedEngine, test: Case, joules: Iterator[int] | None = None) -> Sample:
    """A repetition by the engine's own clock. Energy is what `joules` gives each time it is asked for."""
    requests = [Request([1] * test.prompt_ids, Sampling(), test.new_tokens, 0) for _ in range(test.n_parallel)]
    thread = EngineThread(engine)
    try:
        return measure(thread, test, requests, lambda: joules and float(next(joules)), lambda: engine.now)
    finally:
        thread.close()


@pytest.mark.parametrize("text", ["", "x", "1,,2", "-1", "1.5", "99999999999"])
def test_a_list_of_counts(text: str) -> None:
    assert plan.parse_counts("512, 2048,512", "prompt_tokens", 0) == (512, 2048)
    with pytest.raises(UsageError, match=r"^depth "):
        plan.parse_counts(text, "depth", 0)


def test_the_grid_is_every_depth_with_every_batch_by_llama_benchs_names() -> None:
    grid = plan.grid(Settings(prompt_tokens=(64, 128), new_tokens=(8,), depths=(0, 32), batches=(1, 4)))
    expected = ["pp64", "pp128", "tg8", "tg8 @ d32", "tg8 x4", "tg8 @ d32 x4", "pp64+tg8"]
    assert [test.name for test in grid] == expected
    assert plan.grid(Settings(prompt_tokens=(0,), new_tokens=(8,))) == [Case(0, 8)]
    assert plan.batchable(grid, 4, "other") == (grid, [])


def test_every_repetition_has_all_tests_in_another_order() -> None:
    tests = plan.grid(Settings(depths=(0, 1, 2, 3)))
    orders = [list(plan.schedule(tests, Settings(repetitions=6, seed=seed))) for seed in (3, 3, 4)]
    rounds = [[test for repetition, test in orders[0] if repetition == number] for number in range(6)]
    assert [repetition for repetition, _ in orders[0]] == sorted(list(range(6)) * len(tests))
    assert all(set(order) == set(tests) and len(order) == len(tests) for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert orders[0] == orders[1] != orders[2]


def test_no_two_prompts_share_a_first_token() -> None:
    prompts, again = (Prompts(range(10, 60), seed=1) for _ in range(2))
    drawn = [prompts.draw(5) for _ in range(50)]
    assert {prompt[0] for prompt in drawn} == set(range(10, 60)) >= {token for prompt in drawn for token in prompt}
    assert [again.draw(5) for _ in range(50)] == drawn
    assert len(prompts.draw(3)) == 3  # more prompts than first tokens


def test_a_prompt_is_timed_by_the_engine_and_has_one_token_more() -> None:
    engine = PacedEngine(prompt_seconds=0.25, reused=8)
    sample = run(engine, Case(100, 0), itertools.count())
    assert (sample.ns, sample.itl_ns, sample.reused_tokens, sample.joules) == (250 * MS, (), 8, 1)
    assert (len(engine.requests[0].ids), engine.requests[0].max_new_tokens) == (101, 1)


def test_a_generation_is_timed_from_its_first_token_to_its_last() -> None:
    engine = PacedEngine(first=50, step=2)
    sample = run(engine, Case(0, 10, 20), itertools.count())
    assert (sample.ns, sample.ttft_ns, sample.itl_ns, sample.joules) == (20 * MS, 50 * MS, (2 * MS,) * 10, 1)
    assert len(engine.requests[0].ids) == 20


def test_an_answer_is_timed_from_the_call_to_its_last_token() -> None:
    sample = run(PacedEngine(first=10, step=2), Case(20, 5), itertools.count())
    assert (sample.ns, sample.itl_ns, sample.joules) == (18 * MS, (2 * MS,) * 4, 2)


@pytest.mark.parametrize("new_tokens", [4, 20])
def test_a_batch_is_timed_while_all_of_it_runs(new_tokens: int) -> None:
    engine = BatchEngine(4)
    sample = run(engine, Case(0, new_tokens, 4, 4), itertools.count())
    # A pass takes 20 ms and 1 ms for each of its four tokens, whichever prompts came before.
    assert sample.ns == new_tokens * 24 * MS
    assert len(sample.itl_ns) == 4 * new_tokens
    # A joule was counted from the fourth request's first token to the first one's last: three passes less.
    assert sample.joules == pytest.approx(new_tokens * 24 / ((new_tokens - 3) * 24 - 3))


def test_the_script_for_gpus_counts_a_batch_as_it_runs() -> None:
    engine = BatchEngine(4)
    thread = EngineThread(engine)

    def prepare(new_tokens: int) -> Callable[[], list[object]]:
        def start() -> list[object]:
            engine.gate.clear()
            streams = [thread.stream(Request([1], Sampling(), new_tokens, 0)) for _ in range(8)]
            engine.gate.set()
            return [Stream(stream) for stream in streams]

        return start

    rate, first, whole = fast_path.steady(prepare, 8, 64, lambda: engine.now / 1e9)
    thread.close()
    # Of eight requests four run at a time: four tokens in 24 ms, however the second four begin.
    assert rate == pytest.approx(4 / 0.024)
    assert first > 0
    # With prompts, which take time, it is less.
    assert 0.5 * rate < whole < rate


class Stream(Iterator[Chunk]):
    """What the script uses of `exl_cli.Model.stream`."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._taken: list[int] = []
        self._chunks = chunks

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        self._taken += chunk.token_ids
        return chunk

    def result(self) -> SimpleNamespace:
        for _ in self:
            pass
        return SimpleNamespace(token_ids=self._taken)


@pytest.mark.parametrize(
    ("engine", "test", "words"),
    [
        (PacedEngine(tokens=6), Case(0, 10), "after 6 of 11 tokens"),
        (PacedEngine(prompt_seconds=0.0), Case(10, 0), "no time for pp10"),
        (TurnsEngine(), Case(0, 20, 4, 2), "one after another"),
        (PacedEngine(), Case(0, 5, 2000, 2), "2,000 tokens"),
    ],
)
def test_a_repetition_without_tokens_is_an_error(engine: PacedEngine, test: Case, words: str) -> None:
    with pytest.raises(ExlError, match=words):
        run(engine, test)
