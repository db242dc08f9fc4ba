"""What a benchmark measures, in which order, with which prompts, and how a repetition is timed."""

from __future__ import annotations

import itertools
import time

import pytest
from benchfakes import BatchEngine, PacedEngine, TurnsEngine

from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench import plan
from exl_cli.bench.measure import Energy, measure
from exl_cli.bench.plan import Case, Prompts, Settings
from exl_cli.bench.result import Sample
from exl_cli.engines.base import Request
from exl_cli.errors import EngineError, UsageError, spell
from exl_cli.sampling import Sampling


def run(engine: PacedEngine, test: Case, energy: Energy = lambda: None) -> Sample:
    requests = [Request([1] * test.prompt_ids, Sampling(), test.new_tokens, 0) for _ in range(test.n_parallel)]
    thread = EngineThread(engine)
    try:
        return measure(thread, test, requests, energy)
    finally:
        thread.close()


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (Case(512, 0), "pp512"),
        (Case(0, 128), "tg128"),
        (Case(0, 128, 4096), "tg128 @ d4096"),
        (Case(512, 128), "pp512+tg128"),
        (Case(0, 16, 512, 4), "tg16 @ d512 x4"),
    ],
)
def test_names_are_those_of_llama_bench(test: Case, name: str) -> None:
    assert test.name == name


def test_a_list_of_counts() -> None:
    assert plan.parse_counts("512, 2048,512", "prompt_tokens", 0) == (512, 2048)


@pytest.mark.parametrize("text", ["", "x", "1,,2", "-1", "1.5", "99999999999"])
def test_what_is_no_list_of_counts(text: str) -> None:
    with pytest.raises(UsageError, match=r"^depth "):
        plan.parse_counts(text, "depth", 0)


def test_the_grid_is_every_depth_with_every_batch() -> None:
    settings = Settings(prompt_tokens=(64, 128), new_tokens=(8,), depths=(0, 32), batches=(1, 4))
    names = [test.name for test in plan.grid(settings)]
    assert names == ["pp64", "pp128", "tg8", "tg8 @ d32", "tg8 x4", "tg8 @ d32 x4", "pp64+tg8"]
    assert [test.name for test in plan.grid(Settings(prompt_tokens=(0,), new_tokens=(8,)))] == ["tg8"]
    with pytest.raises(UsageError, match="nothing"):
        plan.grid(Settings(prompt_tokens=(0,), new_tokens=(0,)))


def test_what_does_not_fit_is_left_out_by_name() -> None:
    tests = plan.grid(Settings(prompt_tokens=(100,), new_tokens=(10,), depths=(0, 500)))
    kept, skipped = plan.fitting(tests, 120, "tiny")
    assert [test.name for test in kept] == ["pp100", "tg10", "pp100+tg10"]
    assert skipped == ["tg10 @ d500 left out for tiny: it needs 511 tokens of context, there are 120"]
    with pytest.raises(UsageError, match=r"tg10 needs 12 tokens, there are 8"):
        plan.fitting(tests, 8, "tiny")


def test_batches_are_refused_by_the_engines_name() -> None:
    tests = plan.grid(Settings(batches=(1, 4, 16)))
    kept, skipped = plan.batchable(tests, 1, "cpu")
    assert all(test.n_parallel == 1 for test in kept)
    assert [spell(text) for text in skipped] == ["batch 4,16 left out: the cpu engine computes one request at a time"]
    with pytest.raises(UsageError, match="the cpu engine computes one request at a time, so it cannot run batch 4"):
        plan.batchable(plan.grid(Settings(batches=(4,))), 1, "cpu")
    assert plan.batchable(tests, 16, "other") == (tests, [])


def test_every_repetition_has_all_tests_in_an_order_of_its_own() -> None:
    tests = plan.grid(Settings(depths=(0, 1, 2, 3)))
    settings = Settings(repetitions=6, seed=3)
    order = list(plan.schedule(tests, settings))
    rounds = [[index for repetition, index in order if repetition == number] for number in range(6)]
    assert [repetition for repetition, _ in order] == sorted(repetition for repetition, _ in order)
    assert all(sorted(one) == list(range(len(tests))) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert order == list(plan.schedule(tests, settings))
    assert order != list(plan.schedule(tests, Settings(repetitions=6, seed=4)))


def test_no_two_prompts_share_a_first_token() -> None:
    prompts = Prompts(range(10, 60), seed=1)
    drawn = [prompts.draw(length) for length in itertools.islice(itertools.cycle((1, 5, 20)), 50)]
    assert len({prompt[0] for prompt in drawn}) == 50
    assert {token for prompt in drawn for token in prompt} <= set(range(10, 60))
    assert [len(prompt) for prompt in drawn[:4]] == [1, 5, 20, 1]
    again = Prompts(range(10, 60), seed=1)
    assert [again.draw(len(prompt)) for prompt in drawn] == drawn
    assert len(prompts.draw(3)) == 3  # more prompts than first tokens: they begin anew


def test_a_prompt_is_timed_by_the_engine_and_has_one_token_more() -> None:
    test = Case(100, 0)
    engine = PacedEngine(prompt_seconds=0.25)
    sample = run(engine, test)
    assert sample.ns == 250_000_000
    assert sample.itl_ns == ()
    assert (len(engine.requests[0].ids), engine.requests[0].max_new_tokens) == (101, 1)


def test_a_generation_is_timed_from_its_first_token_to_its_last() -> None:
    test = Case(0, 10, 20)
    engine = PacedEngine(first=0.05, step=0.002)
    start = time.perf_counter()
    sample = run(engine, test)
    whole = time.perf_counter() - start
    assert len(engine.requests[0].ids) == 20
    assert len(sample.itl_ns) == 10
    assert sum(sample.itl_ns) == pytest.approx(sample.ns, rel=0.02)
    assert 0.020 <= sample.ns / 1e9 <= whole - 0.05
    assert 0.05 <= sample.ttft_ns / 1e9 <= whole - 0.020


def test_an_answer_is_timed_from_the_call_to_its_last_token() -> None:
    test = Case(20, 5)
    start = time.perf_counter()
    sample = run(PacedEngine(first=0.01, step=0.002), test)
    assert 0.018 <= sample.ns / 1e9 <= time.perf_counter() - start
    assert len(sample.itl_ns) == 4


def test_the_energy_is_that_of_the_timed_part() -> None:
    # One joule more each time it is read: at the call, at the first token, at the last one.
    for test, joules in ((Case(10, 0), 1), (Case(0, 4), 1), (Case(10, 4), 2)):
        counter = itertools.count(100)
        sample = run(PacedEngine(), test, lambda counter=counter: float(next(counter)))
        assert sample.joules == joules


def test_reused_tokens_are_not_hidden() -> None:
    test = Case(10, 0)
    assert run(PacedEngine(reused=8), test).reused_tokens == 8


def test_an_engine_that_stops_early_is_an_error() -> None:
    test = Case(0, 10)
    with pytest.raises(EngineError, match="after 6 of 11 tokens"):
        run(PacedEngine(tokens=6), test)


def test_an_engine_without_a_prompt_time_is_an_error() -> None:
    test = Case(10, 0)
    with pytest.raises(EngineError, match="no time for pp10"):
        run(PacedEngine(prompt_seconds=0.0), test)


def test_requests_of_a_batch_run_at_the_same_time() -> None:
    test = Case(0, 20, 4, 3)
    engine = BatchEngine()
    sample = run(engine, test)
    assert len(engine.requests) == 3
    assert len(sample.itl_ns) == 3 * 20
    assert sample.ns > 0


def test_an_engine_that_takes_turns_is_found_out() -> None:
    test = Case(0, 20, 4, 2)
    with pytest.raises(EngineError, match="one after the other"):
        run(TurnsEngine(), test)


def test_an_error_in_one_of_several_requests_comes_out() -> None:
    test = Case(0, 5, 2000, 2)
    with pytest.raises(Exception, match="2,000 tokens"):
        run(PacedEngine(), test)
