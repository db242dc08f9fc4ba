"""From a request to its chunks, and from payloads to a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.responses import Response

from exl_cli.engines.base import Chunk, Request
from exl_cli.server.errors import RETRY_AFTER, ApiError, as_api_error
from exl_cli.server.metrics import Metrics
from exl_cli.server.pool import ServedModel
from exl_cli.server.state import Inbox, ServerState, Usage, usage


@contextlib.asynccontextmanager
async def accept(state: ServerState, name: str | None, count: int = 1) -> AsyncIterator[ServedModel]:
    """Take a request on and hold its model, loaded first if need be.

    Args:
        state: the server.
        name: of the model; None or "" for the default.
        count: generations that it comes to: choices times prompts.

    Raises:
        ApiError: 400 for more generations than the queue ever takes, 404 for an unknown model, 429 where the queue is
            full, 503 where the model cannot be loaded or the server is shutting down, 500 after a fault of the device.
    """
    if state.phase == "failed":
        raise ApiError(500, "the GPU failed; the server is shutting down", "engine_failed")
    if state.phase == "stopping":
        raise ApiError(503, "the server is shutting down", "stopping", headers=RETRY_AFTER)
    room = state.settings.queue + (sum(model.engine.max_batch for model in state.pool.loaded) or 1)
    if count > room:
        raise ApiError(400, f"the request needs {count:,} generations; at most {room:,} are allowed", "invalid_value")
    if state.accepted + count > room:
        said = f"{state.accepted:,} of {room:,} generations are running or queued; try again later"
        raise ApiError(429, said, "queue_full", headers=RETRY_AFTER)
    state.accepted += count
    try:
        async with state.use(name) as model:
            yield model
    finally:
        state.accepted -= count


async def generate(
    state: ServerState, model: ServedModel, request: Request, *, counts_prompt: bool
) -> AsyncGenerator[Chunk, None]:
    """The chunks of one generation, the last with its summary. Leaving it early cancels the rest at once.

    Args:
        state: the server.
        model: from `accept`.
        request: what to generate.
        counts_prompt: whether the log counts its prompt: once for all choices that share it, as in their usage.

    Raises:
        ApiError: 400 for a prompt that does not fit, on the first iteration; later, what ended the generation.
    """
    inbox: Inbox = asyncio.Queue()
    loop = asyncio.get_running_loop()
    if state.settings.log_prompts:
        state.note(f"prompt: {json.dumps(model.tokenizer.decode(request.ids), ensure_ascii=False)}")
    watch = _Watch(state.metrics, model.name, counts_prompt=counts_prompt)

    def deliver(item: Chunk | BaseException) -> None:
        loop.call_soon_threadsafe(inbox.put_nowait, item)

    try:
        request_id = model.engine.submit(request, deliver)
    except Exception as error:
        raise as_api_error(error) from error
    state.inboxes.add(inbox)
    model.submitted += 1
    ended = False
    try:
        while not ended:
            item = await inbox.get()
            ended = isinstance(item, BaseException) or item.summary is not None
            if isinstance(item, BaseException):
                watch.end("error")
                raise as_api_error(item) from item
            watch.see(item, request)
            if item.summary is not None and item.summary.finish_reason == "cancelled":
                raise ApiError(503, "the model was unloaded", "model_not_loaded", headers=RETRY_AFTER)
            yield item
    finally:
        model.submitted -= 1
        state.inboxes.discard(inbox)
        if not ended:
            watch.end("cancelled")
            model.engine.cancel(request_id)


class _Watch:
    """Counts a generation as it comes."""

    def __init__(self, metrics: Metrics, model: str, *, counts_prompt: bool) -> None:
        self._counts_prompt = counts_prompt
        self._metrics, self._model, self._usage = metrics, model, usage.get(Usage())
        self._last = time.monotonic()
        self._begun = False

    def see(self, chunk: Chunk, request: Request) -> None:
        """Count a chunk."""
        metrics, name = self._metrics, self._model
        if count := len(chunk.token_ids):
            now = time.monotonic()
            if self._begun:
                metrics.inter_token.labels(name).observe((now - self._last) / count)
            else:
                metrics.first_token.labels(name).observe(now - self._last)
                metrics.prompt_tokens.labels(name).inc(len(request.ids))
                self._usage.prompt_tokens += len(request.ids) if self._counts_prompt else 0
            self._begun, self._last = True, now
            metrics.new_tokens.labels(name).inc(count)
            self._usage.new_tokens += count
        if (summary := chunk.summary) is not None:
            metrics.reused_tokens.labels(name).inc(summary.reused_tokens)
            metrics.drafted_tokens.labels(name).inc(summary.drafted_tokens)
            metrics.accepted_tokens.labels(name).inc(summary.accepted_tokens)
            self.end(summary.finish_reason)

    def end(self, reason: str) -> None:
        """Count its end."""
        self._metrics.generations.labels(self._model, reason).inc()


def sse(data: str, event: str | None = None) -> str:
    """One server-sent event; `data` has no line breaks, as JSON has none."""
    return f"event: {event}\ndata: {data}\n\n" if event else f"data: {data}\n\n"


async def event_stream(
    state: ServerState, events: AsyncIterator[str], on_error: Callable[[ApiError], str]
) -> EventStream:
    """A streamed response, which begins with the first event or after 10 s, whichever comes first.

    So what is wrong with a request is still a status, unless it takes longer than that to find out.

    Args:
        state: the server.
        events: texts as `sse` writes them. It is iterated in a task and closed when the client goes away.
        on_error: an error as an event, once the response has begun.

    Raises:
        ApiError: what `events` raised before its first event.
    """
    stream = EventStream(state, events, on_error)
    await stream.begin()
    return stream


class EventStream(Response):
    """Server-sent events, with a comment where 10 s pass without any. Make it with `event_stream`."""

    media_type = "text/event-stream"

    def __init__(self, state: ServerState, events: AsyncIterator[str], on_error: Callable[[ApiError], str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._state, self._on_error = state, on_error
        self._ready: asyncio.Queue[str | ApiError | None] = asyncio.Queue()
        self._held: list[str | ApiError | None] = []
        self._pump = asyncio.create_task(self._run(events))

    async def _run(self, events: AsyncIterator[str]) -> None:
        try:
            async for event in events:
                self._ready.put_nowait(event)
            self._ready.put_nowait(None)
        except Exception as error:
            answer = as_api_error(error)
            answer.__cause__ = answer.__cause__ or (error if error is not answer else None)
            self._ready.put_nowait(answer)
        finally:
            if (close := getattr(events, "aclose", None)) is not None:
                await close()

    async def begin(self) -> None:
        """Wait for the first event."""
        try:
            item = await self._next()
        except BaseException:
            self._pump.cancel()
            raise
        if isinstance(item, ApiError):
            raise item
        self._held.append(item)

    async def _next(self) -> str | ApiError | None:
        if not self._ready.empty():
            return self._ready.get_nowait()
        try:
            return await asyncio.wait_for(self._ready.get(), self._state.settings.keep_alive_seconds)
        except asyncio.TimeoutError:  # not the built-in one yet in Python 3.10
            return ": keep-alive\n\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send what comes until it ends."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                item = self._held.pop() if self._held else await self._next()
                if item is None:
                    break
                if isinstance(item, ApiError):
                    self._state.report(item, item)
                text = self._on_error(item) if isinstance(item, ApiError) else item
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                if isinstance(item, ApiError):
                    break
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._pump.cancel()
