"""Streams of one response, for threads (`Stream`) and asyncio (`AsyncStream`), and the finished `Generation`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Chunk, Request, Summary
from exl_cli.errors import EngineError, ResponseTimeoutError, UsageError, spell

# None wakes a reader after the stream was closed.
Item = Chunk | BaseException | None


def is_number(value: object) -> bool:
    """Whether a value is an int or float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Generation:
    """A complete response.

    Attributes:
        text: the text, without stop strings and special tokens.
        token_ids: its tokens, including EOS.
        seed: the seed that reproduces it.
        summary: finish reason, token counts and timings; see `engines.base.Summary`.
    """

    text: str
    token_ids: tuple[int, ...]
    seed: int
    summary: Summary

    def __str__(self) -> str:
        return self.text


class _Reader:
    """Common part of both streams: collects the response, enforces the timeout, cancels."""

    def __init__(
        self, thread: EngineThread, request: Request, deliver: Callable[[Item], None], timeout: float | None
    ) -> None:
        if timeout is not None and (not is_number(timeout) or not timeout >= 0):
            raise UsageError(f"timeout must be a non-negative number of seconds, got {timeout!r}")
        if timeout is not None and timeout > threading.TIMEOUT_MAX:  # centuries
            timeout = None
        self._closed = False
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._text: list[str] = []
        self._ids: list[int] = []
        self._generation: Generation | None = None
        self._deliver = deliver
        self._thread, self._seed = thread, request.seed
        self._request_id = thread.submit(request, deliver)

    def close(self) -> None:
        """Cancel the rest of the response, if any. Thread-safe."""
        self._closed = True
        if self._generation is None:
            self._thread.cancel(self._request_id)
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._deliver(None)

    def __del__(self) -> None:
        if hasattr(self, "_request_id"):
            self.close()

    def _is_open(self) -> bool:
        return self._generation is None and not self._closed

    def _add(self, item: Item) -> str:
        """Add a delivered item and return its text."""
        if item is None:
            return ""
        if isinstance(item, BaseException):
            raise item
        self._text.append(item.text)
        self._ids += item.token_ids
        if item.summary is not None and not self._closed:
            if item.summary.finish_reason == "cancelled":
                # Cancelled by closing the model, not the stream: do not return a partial response as complete.
                raise EngineError(
                    "the model was closed before the response was complete",
                    "keep it open until the response is complete",
                )
            summary = dataclasses.replace(item.summary, note=spell(item.summary.note))
            self._generation = Generation("".join(self._text), tuple(self._ids), self._seed, summary)
        return item.text

    def _remaining(self) -> float | None:
        """Seconds left, at least 0; None without a timeout."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def _too_late(self) -> ResponseTimeoutError:
        return ResponseTimeoutError(
            f"the response was not complete after {self._timeout:g} seconds", "raise the timeout"
        )

    def _complete(self) -> Generation:
        if self._generation is None:
            raise EngineError("the stream was closed before the response was complete", "read it to the end")
        return self._generation


class Stream(_Reader, Iterator[str]):
    """Iterates over the text of one response, in non-empty pieces.

    Generation starts at once, in the background, and does not wait for the reader: unread pieces stay in memory, at
    most `max_new_tokens` of them. Closing the stream, leaving its `with` block, or dropping it cancels the rest.

    Iterating raises:
        EngineError: the model was closed meanwhile, or the engine failed.
        UsageError: the engine does not support a sampler setting.
        OutOfMemoryError: the device ran out of memory.
        ResponseTimeoutError: the timeout has passed; also a TimeoutError.
    """

    def __init__(self, thread: EngineThread, request: Request, timeout: float | None = None) -> None:
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        super().__init__(thread, request, self._inbox.put, timeout)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        while self._is_open():
            if text := self._receive():
                return text
        raise StopIteration

    def result(self) -> Generation:
        """Wait for the end and return the complete response, including what was already iterated over.

        Raises:
            EngineError: the stream was closed before its end; and everything that iterating raises.
        """
        for _ in self:
            pass
        return self._complete()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> str:
        try:
            return self._add(self._inbox.get(timeout=self._remaining()))
        except queue.Empty:
            self.close()
            raise self._too_late() from None
        except BaseException:
            self.close()
            raise


class AsyncStream(_Reader, AsyncIterator[str]):
    """`Stream` for an event loop: no thread waits while the model works. To be made and read on the loop's thread."""

    def __init__(self, thread: EngineThread, request: Request, timeout: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Item] = asyncio.Queue()

        def deliver(item: Item) -> None:
            # Raises where the loop is closed, and nobody will read this: then the request is cancelled.
            loop.call_soon_threadsafe(inbox.put_nowait, item)

        self._inbox = inbox
        super().__init__(thread, request, deliver, timeout)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        while self._is_open():
            if text := await self._receive():
                return text
        raise StopAsyncIteration

    async def result(self) -> Generation:
        """See `Stream.result`."""
        async for _ in self:
            pass
        return self._complete()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _receive(self) -> str:
        try:
            if self._remaining() == 0:
                await asyncio.sleep(0)  # accept what arrived while the loop was busy
            if self._inbox.empty():
                return self._add(await asyncio.wait_for(self._inbox.get(), self._remaining()))
            return self._add(self._inbox.get_nowait())
        except asyncio.TimeoutError:  # distinct from the built-in TimeoutError in Python 3.10
            self.close()
            raise self._too_late() from None
        except BaseException:  # including CancelledError
            self.close()
            raise
