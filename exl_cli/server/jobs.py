"""From the body of a request to its answer: the model taken, its prompt rendered, its generations run side by side."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from exl_cli.api.bodies import ALIASES
from exl_cli.api.choices import Job
from exl_cli.engines.base import Chunk, Request
from exl_cli.server.errors import ApiError
from exl_cli.server.generation import accept, event_stream, generate, sse
from exl_cli.server.pool import ServedModel
from exl_cli.server.state import ServerState, caller

# Names of ignored fields that a header holds, and of each so many characters.
_MOST_IGNORED = 32
# Names that may stand in a header: an empty one, or a space at its end, would break it.
_HEADER_WORD = re.compile(r"[\w.-]+", re.ASCII)


class TextBody(Protocol):
    """A body that comes to generations; see `api.bodies.GenerationBody`."""

    model: str
    stream: bool

    @property
    def n(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...


async def respond(
    state: ServerState,
    body: TextBody,
    job_of: Callable[[ServedModel], Job],
    write: Callable[[dict[str, Any]], str],
    on_error: Callable[[ApiError], str],
    last: str = "",
) -> Response:
    """Answer a body.

    Args:
        state: the server.
        body: from a client.
        job_of: turns the body into requests to a model.
        write: an event as it is streamed.
        on_error: an error as it is streamed.
        last: what ends a stream.
    """

    async def events() -> AsyncIterator[str]:
        async with _running(state, body, job_of) as (job, chunks):
            async for index, chunk in chunks:
                for event in job.push(index, chunk):
                    yield write(event)
            for event in job.end():
                yield write(event)
            if last:
                yield last

    response: Response
    if body.stream:
        response = await event_stream(state, events(), on_error)
    else:
        async with _running(state, body, job_of) as (job, chunks):
            async for index, chunk in chunks:
                job.push(index, chunk)
            response = JSONResponse(job.result())
    if names := ", ".join(name[:64] for name in body.ignored[:_MOST_IGNORED] if _HEADER_WORD.fullmatch(name)):
        response.headers["X-Exl-Ignored"] = names
    return response


@contextlib.asynccontextmanager
async def _running(
    state: ServerState, body: TextBody, job_of: Callable[[ServedModel], Job]
) -> AsyncIterator[tuple[Job, AsyncIterator[tuple[int, Chunk]]]]:
    """The job of a body and its chunks; what is left of it is cancelled on leaving."""
    async with accept(state, body.model, body.count) as model:
        # Templates render in another process, and long texts take a while to tokenize.
        job = await model.in_thread(job_of, model)
        requests = job.requests
        if state.settings.prefix_cache_per_key:
            requests = [dataclasses.replace(r, cache_salt=f"{caller.get()}\n{r.cache_salt}") for r in requests]
        async with contextlib.aclosing(_chunks(state, model, requests, body.n)) as chunks:
            yield job, chunks


async def _chunks(
    state: ServerState, model: ServedModel, requests: Sequence[Request], choices: int
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of several requests as they come, each with its request's index; `choices` requests share a prompt."""
    queue: asyncio.Queue[tuple[int, Chunk | Exception]] = asyncio.Queue()

    async def run(index: int, request: Request) -> None:
        try:
            async with contextlib.aclosing(
                generate(state, model, request, counts_prompt=index % choices == 0)
            ) as chunks:
                async for chunk in chunks:
                    queue.put_nowait((index, chunk))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(run(index, request)) for index, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item.summary is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event_text(event: dict[str, Any]) -> str:
    """An event as one line of JSON."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def named_event(event: dict[str, Any]) -> str:
    """An event under the name of its type."""
    return sse(event_text(event), event["type"])


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that it reads itself; others' names for its fields are listed, too."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(value: Any, depth: int = 0) -> Any:
        if isinstance(value, dict) and "$ref" in value:
            name = value["$ref"].rsplit("/", 1)[1]
            return inlined(definitions[name], depth + 1) if depth < 6 else {}
        if isinstance(value, dict):
            return {key: inlined(item, depth) for key, item in value.items()}
        return [inlined(item, depth) for item in value] if isinstance(value, list) else value

    schema = inlined(schema)
    properties = schema["properties"]
    for theirs, ours in ALIASES.items():
        if ours in properties and theirs not in properties:
            properties[theirs] = {**properties[ours], "description": f"Another name of {ours}."}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {**schema, "additionalProperties": True}}},
        }
    }
