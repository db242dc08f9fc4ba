"""One model, many threads and tasks: order, cancelling, closing, failures. All waits are bounded."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes import ScriptedEngine
from helpers import collect, python, request_for

from exl_cli import Model, loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Chunk, Event, Request, Summary
from exl_cli.engines.response import Step
from exl_cli.errors import EngineError
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling

STORY = "Once upon a time"
PATIENCE = 30.0
WORDS = (" and", " the", " was", " to")


class EndlessEngine(ScriptedEngine):
    """Says the same word until it is cancelled: " and", or the one of a small seed.

    Attributes:
        at_once: how many generations were running at the same moment, at most.
        ended: set when one has ended.
        between: called before each word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, "", 10**9)
        self.ended = threading.Event()
        self.at_once = self._now = 0
        self.between: Callable[[], None] = lambda: None

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        (word,) = self._tokenizer.encode(WORDS[request.seed if request.seed < 4 else 0], add_special_tokens=False)
        self._now += 1
        self.at_once = max(self.at_once, self._now)
        try:
            while True:
                self.between()
                time.sleep(0)  # others run meanwhile, as while an engine computes: an event loop has to keep up
                yield Step((word,))
        finally:
            self._now -= 1
            self.ended.set()


def with_engine(kind: type[EndlessEngine] = EndlessEngine) -> tuple[Model, EndlessEngine]:
    info = loader.resolve(None)
    tokenizer = Tokenizer(info.path)
    engine = kind(tokenizer)
    return Model(info, tokenizer, engine), engine


@pytest.fixture
def endless() -> Iterator[tuple[Model, EndlessEngine]]:
    model, engine = with_engine()
    with model:
        yield model, engine


def test_concurrent_streams_each_get_their_own_text(endless) -> None:
    ready = threading.Barrier(4)

    def read(seed: int) -> str:
        ready.wait(PATIENCE)
        return "".join(endless[0].stream(STORY, seed=seed, max_new_tokens=50, timeout=PATIENCE))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [word * 50 for word in WORDS]


def test_requests_run_first_come_first_served(endless) -> None:
    model, engine = endless
    streams = [model.stream(f"{STORY} {number}", max_new_tokens=5) for number in range(8)]
    asked = [stream.result().summary.prompt_tokens for stream in streams]
    assert [len(request.ids) for request in engine.requests] == asked
    assert [request.ids for request in engine.requests] == [model.encode(f"{STORY} {number}") for number in range(8)]
    assert engine.at_once == 1


@pytest.mark.parametrize("way", ["close", "leave", "drop"])
def test_a_consumer_that_stops_half_way_frees_the_engine(endless, way: str) -> None:
    model, engine = endless
    stream = model.stream(STORY, max_new_tokens=10**9, timeout=PATIENCE)
    assert [next(stream), next(stream)] == [" and", " and"]
    if way == "close":
        stream.close()
        assert list(stream) == []
        with pytest.raises(EngineError, match="closed before"):
            stream.result()
    elif way == "leave":
        with stream:
            pass
    else:
        del stream
    assert engine.ended.wait(PATIENCE)
    assert model.generate(STORY, max_new_tokens=2, timeout=PATIENCE).text == " and and"


def test_closing_a_stream_wakes_who_waits_for_its_turn(endless) -> None:
    model, _ = endless
    first, second = (model.stream(STORY, max_new_tokens=10**9) for _ in range(2))
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, second)
        second.close()
        assert waiting.result(PATIENCE) == []
    assert next(first) == " and"

    async def main() -> list[str]:
        third = model.astream(STORY, max_new_tokens=10**9)

        async def read() -> list[str]:
            return [text async for text in third]

        task = asyncio.create_task(read())
        await asyncio.get_running_loop().run_in_executor(None, third.close)
        return await asyncio.wait_for(task, PATIENCE)

    assert asyncio.run(main()) == []
    assert next(first) == " and"


def test_a_response_that_takes_too_long_ends_and_frees_the_engine(endless) -> None:
    model, _ = endless
    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        model.generate(STORY, max_new_tokens=10**9, timeout=0.01)
    assert model.generate(STORY, max_new_tokens=1, timeout=PATIENCE).text == " and"


def test_what_was_complete_in_time_may_be_read_later(endless) -> None:
    model, _ = endless

    async def main() -> str:
        stream = model.astream(STORY, max_new_tokens=3, timeout=0)
        model.generate(STORY, max_new_tokens=1, timeout=PATIENCE)  # which comes after it
        return (await stream.result()).text

    assert asyncio.run(main()) == " and and and"


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("started", [False, True])
def test_failing_to_start_a_thread_leaves_the_engine_usable(
    endless, monkeypatch: pytest.MonkeyPatch, error: BaseException, started: bool
) -> None:
    model, _ = endless
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if started:
            start(thread)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises((EngineError, KeyboardInterrupt), match=r"cannot start a thread: can't start|^$"):
            model.generate(STORY, max_new_tokens=2, timeout=PATIENCE)
    assert model.generate(STORY, max_new_tokens=2, timeout=PATIENCE).text == " and and"
    model.close()


def test_closing_from_the_engine_thread_does_not_deadlock(endless) -> None:
    model, engine = endless
    stream = model.stream(STORY, max_new_tokens=10**9)
    next(stream)
    # As the garbage collector may have it do, at any point.
    engine.between = model.close
    assert engine.ended.wait(PATIENCE)
    model.close()
    assert engine.closed


def test_an_error_reaches_only_its_own_request(endless) -> None:
    model, engine = endless

    def fail() -> None:
        engine.between = lambda: None
        raise EngineError("it broke")

    engine.between = fail
    broken, whole = (model.stream(STORY, max_new_tokens=3) for _ in range(2))
    with pytest.raises(EngineError, match="it broke"):
        broken.result()
    assert whole.result().text == " and and and"


def test_closing_the_model_cancels_running_requests() -> None:
    model, engine = with_engine()
    running, waiting = model.stream(STORY, max_new_tokens=10**9), model.stream(STORY)
    next(running)
    model.close()
    assert engine.closed
    for stream in (running, waiting):
        with pytest.raises(EngineError, match="the model was closed before the response was complete"):
            stream.result()


def test_a_batching_engine_gets_max_batch_requests(endless) -> None:
    model, engine = endless
    engine.max_batch = 2
    streams = [model.stream(STORY, max_new_tokens=10**9, timeout=PATIENCE) for _ in range(3)]
    for stream in streams[:2]:
        assert [next(stream) for _ in range(3)] == [" and"] * 3
    streams[0].close()
    assert next(streams[2]) == " and"
    assert engine.at_once == 2


def test_more_tasks_than_the_loop_has_threads(endless) -> None:
    model, engine = endless

    async def main() -> list[str]:
        streams = [model.astream(STORY, max_new_tokens=3, timeout=PATIENCE) for _ in range(50)]

        async def read(number: int) -> str:
            return "".join([text async for text in streams[number]])

        # The last first: a waiting thread must not block the others.
        return await asyncio.gather(*[read(number) for number in reversed(range(50))])

    assert asyncio.run(main()) == [" and and and"] * 50
    assert engine.at_once == 1


def test_a_cancelled_task_frees_the_engine(endless) -> None:
    model, _ = endless

    async def main() -> str:
        begun = asyncio.Event()

        async def read() -> None:
            async with model.astream(STORY, max_new_tokens=10**9) as stream:
                async for _ in stream:
                    begun.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await model.astream(STORY, max_new_tokens=10**9, timeout=0.01).result()
        return (await model.astream(STORY, max_new_tokens=2, timeout=PATIENCE).result()).text

    assert asyncio.run(main()) == " and and"


def test_an_event_loop_that_is_gone_frees_the_engine(endless) -> None:
    model, engine = endless
    kept = []

    async def main() -> None:
        kept.append(model.astream(STORY, max_new_tokens=10**9))
        await anext(kept[0])

    asyncio.run(main())
    assert engine.ended.wait(PATIENCE)
    assert model.generate(STORY, max_new_tokens=1, timeout=PATIENCE).text == " and"


def run(program: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a program that may use this module."""
    prelude = (
        "import os, sys, threading\nfrom test_engine_thread import STORY, with_engine\nmodel, engine = with_engine()\n"
    )
    done = python(prelude + program, path=[Path(__file__).parent], timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_half_read_stream_does_not_block_exit_or_other_threads() -> None:
    program = """
engine.max_batch = 2
stream = model.stream(STORY, max_new_tokens=10**9)
print(next(stream))
def read():
    threading.main_thread().join()
    print(model.generate(STORY, max_new_tokens=300).summary.new_tokens)
threading.Thread(target=read).start()
"""
    assert run(program) == (0, " and\n300\n", "")


def test_requests_and_chunks_are_plain_data() -> None:
    request = Request((1, 2, 3), Sampling(temperature=0.5), 9, 1, ("stop",), frozenset({2}))
    chunk = Chunk("text", (4, 5), Summary("stop", 3, 1, 2, 0.5, 0.25, 0.75))
    assert pickle.loads(pickle.dumps((request, chunk))) == (request, chunk)  # noqa: S301 - our own bytes


def test_a_callback_that_raises_ends_its_own_request_only(endless) -> None:
    thread = EngineThread(endless[1])

    def fail(item: object) -> None:
        raise ValueError("a consumer's own")

    thread.submit(request_for([1, 2, 3], "greedy", 10**9), fail)
    text, _, summary = collect(thread.stream(request_for([1, 2, 3], "greedy", 4)))
    assert (text, summary.finish_reason) == (" and and and and", "length")


def test_a_request_is_cancelled_by_its_id_before_and_while_it_runs(endless) -> None:
    thread = EngineThread(endless[1])
    running, waiting = (thread.stream(request_for([1, 2, 3], "greedy", 10**9)) for _ in range(2))
    next(running)
    thread.cancel(waiting.request_id)
    assert collect(waiting)[2].finish_reason == "cancelled"
    thread.cancel(running.request_id)
    _, tokens, summary = collect(running)
    assert (summary.finish_reason, summary.new_tokens) == ("cancelled", 1 + len(tokens))
    thread.cancel(running.request_id)  # after its end nothing happens
    assert collect(thread.stream(request_for([1, 2, 3], "greedy", 2)))[0] == " and and"


def test_a_bug_in_an_engine_reaches_all_whose_work_it_was_and_the_next_request_works() -> None:
    class Buggy(EndlessEngine):
        broken = True

        def step(self) -> Iterator[Event]:
            if self.broken:
                self.broken = False
                raise KeyError("a bug")
            yield from super().step()

    model, _ = with_engine(Buggy)
    with pytest.raises(KeyError, match="a bug"):
        model.generate(STORY, max_new_tokens=2, timeout=PATIENCE)
    assert model.generate(STORY, max_new_tokens=2, timeout=PATIENCE).text == " and and"
    model.close()


def test_a_model_that_is_dropped_closes_its_engine() -> None:
    model, engine = with_engine()
    model.generate(STORY, max_new_tokens=2, timeout=PATIENCE)
    closed = threading.Event()
    engine.close = closed.set  # type: ignore[method-assign]
    del model
    gc.collect()
    assert closed.wait(PATIENCE)


FORK = """
stream = model.stream(STORY, max_new_tokens=10**9)
next(stream)
child = os.fork()
if child == 0:
    try:
        model.generate(STORY, max_new_tokens=2)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    stream.close()
    model.close()
    sys.exit()
print(os.waitpid(child, 0)[1], next(stream))
model.close()
"""


def test_a_forked_child_gets_an_error_and_the_parent_continues() -> None:
    status, out, err = run(FORK)
    assert (status, err) == (0, "")
    assert out == (
        "EngineError: the model was loaded in another process; load it in this process, after the fork\n0  and\n"
    )
