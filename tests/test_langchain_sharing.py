"""LangChain objects share one engine per model and load options."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import QueueHandler
from queue import Queue
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="needs exl-cli[langchain]")

from shallow import shallow
from test_engine_thread import EndlessEngine, with_engine

from exl_cli import load
from exl_cli.errors import PromptError
from exl_cli.langchain import ChatExLlamaV2, ExLlamaV2, local
from exl_cli.models.load_options import LoadOptions

ENGINE: dict[str, Any] = {"model": str(shallow()), "engine": "cpu", "seed": 1, "max_new_tokens": 8}
LOADED, CLOSED = f"loaded {shallow()} (EXL2 5.0 bpw) with engine cpu", f"closing {shallow()}"


@pytest.fixture
def log() -> Iterator[Callable[[], list[str]]]:
    """The messages since the last call."""
    records: Queue[logging.LogRecord] = Queue()
    logger, handler = logging.getLogger("exl_cli"), QueueHandler(records)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [records.get().getMessage() for _ in range(records.qsize())]
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def test_loaded_once_and_given_back_by_the_last(log) -> None:
    llm, chat = ExLlamaV2(**ENGINE), ChatExLlamaV2(**ENGINE, temperature=0.1)
    assert log() == [LOADED]
    llm.release()
    assert chat.invoke("Hello").content
    assert log() == []
    chat.release()
    chat.release()
    assert log() == [CLOSED]
    assert llm.invoke("Hello")
    assert log() == [LOADED]
    llm.release()
    assert log() == [CLOSED]


def test_what_makes_it_the_same_engine(log) -> None:
    otherwise = str(shallow().parent / "." / ".." / shallow().parent.name / shallow().name)
    made = [ExLlamaV2(**{**ENGINE, **change}) for change in ({}, {"max_seq_len": 64}, {"model": otherwise})]
    assert log() == [LOADED] * 2
    for llm in made:
        llm.release()
    assert log() == [CLOSED] * 2


def test_a_collected_object_releases_its_engine(log) -> None:
    llm = ExLlamaV2(**ENGINE)
    del llm
    gc.collect()
    assert log() == [LOADED, CLOSED]


def test_neither_errors_nor_half_read_streams_hold_the_engine(log) -> None:
    llm, chat = ExLlamaV2(**ENGINE), ChatExLlamaV2(**ENGINE)
    with pytest.raises(PromptError) as kept:  # with its traceback, and so every frame
        llm.invoke("word " * 2000)
    for stream in (llm.stream("Hello"), chat.stream("Hello")):
        next(stream)
        stream.close()

    async def read() -> None:
        async for _ in chat.astream("Hello"):
            break

    asyncio.run(read())
    llm.release()
    chat.release()
    assert log() == [LOADED, CLOSED]
    assert kept.value.message


def test_a_copy_acquires_its_own_reference(log) -> None:
    llm = ExLlamaV2(**ENGINE)
    text = llm.invoke("Hello")
    copied, carried = copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))  # noqa: S301 - our own
    assert copied.invoke("Hello") == carried.invoke("Hello") == text
    llm.release()
    assert copied.invoke("Hello") == text
    assert log() == [LOADED]
    copied.release()
    carried.release()
    assert log() == [CLOSED]


def test_threads_load_once_and_their_streams_do_not_mix(log) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with load(str(shallow()), engine="cpu") as model:
        alone = [
            model.generate(prompt, seed=seed, max_new_tokens=20).text
            for seed in range(3)
            for prompt in ("Once upon a time", messages)
        ]
    log()
    ready = threading.Barrier(6)

    def read(number: int) -> tuple[Any, str]:
        seed, chatting = divmod(number, 2)
        options = {**ENGINE, "seed": seed, "max_new_tokens": 20}
        ready.wait(30)
        if chatting:
            chat = ChatExLlamaV2(**options)
            return chat, "".join(chunk.content for chunk in chat.stream("Hello"))
        llm = ExLlamaV2(**options)
        return llm, "".join(llm.stream("Once upon a time"))

    with ThreadPoolExecutor(6) as pool:
        made, texts = zip(*pool.map(read, range(6)), strict=True)
    assert list(texts) == alone
    assert len(set(alone)) == 6
    for model in made:
        model.release()
    assert log() == [LOADED, CLOSED]


def test_a_generation_may_end_in_the_engine_thread() -> None:
    """As the garbage collector does with one that was abandoned, while others wait for that thread under the lock."""
    model, engine = with_engine(EndlessEngine)
    loaded = local.acquire(model.info, LoadOptions(engine="cpu"))
    released, went_on = threading.Event(), threading.Event()

    def end() -> None:
        if released.is_set():
            went_on.set()
            return
        released.set()
        local.release(loaded)

    with model.stream("Once upon a time", max_new_tokens=10**9):
        with local.lock:
            engine.between = end
            assert went_on.wait(30)
            assert not loaded.model.closed
        for thread in threading.enumerate():
            if thread.name == "exl-release":
                thread.join(30)
        assert loaded.model.closed
    model.close()


def test_the_event_loop_runs_while_another_thread_loads_a_model(log) -> None:
    llm = ExLlamaV2(**ENGINE)
    loading, loaded = threading.Event(), threading.Event()

    def load() -> None:
        with local.lock:
            loading.set()
            loaded.wait(30)

    async def main() -> bool:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in llm.astream("Hello"):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        threading.Thread(target=load).start()
        loading.wait(30)
        waited = await asyncio.wait([task], timeout=0.3) == (set(), {task})
        loaded.set()
        await task
        return waited

    assert asyncio.run(main())
    llm.release()
    assert log() == [LOADED, CLOSED]


def test_a_task_cancelled_while_loading_releases_the_engine(log) -> None:
    llm = ExLlamaV2(**ENGINE)
    llm.release()
    assert log() == [LOADED, CLOSED]

    async def main() -> None:
        task = asyncio.create_task(llm.ainvoke("Hello"))
        while not task.done():
            await asyncio.sleep(0)
            task.cancel()

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "exl-release":
            thread.join(30)
    llm.release()
    said = log()
    assert said.count(LOADED) == said.count(CLOSED)
