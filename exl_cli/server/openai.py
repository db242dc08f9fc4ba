"""Routes of OpenAI's API that generate."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from exl_cli.api.openai import ChatBody, ChatJob, CompletionBody, CompletionJob
from exl_cli.api.responses import ResponsesBody, ResponsesJob
from exl_cli.server.errors import ApiError, openai_body
from exl_cli.server.generation import sse
from exl_cli.server.jobs import body_of, event_text, named_event, respond
from exl_cli.server.state import ServerState, server_state

router = APIRouter(tags=["OpenAI"])

State = Annotated[ServerState, Depends(server_state)]

_DONE = sse("[DONE]")


def _write(event: dict[str, object]) -> str:
    return sse(event_text(event))


def _on_error(error: ApiError) -> str:
    return sse(event_text(openai_body(error)))


def _on_response_error(error: ApiError) -> str:
    return named_event({"type": "error", "message": error.message, "code": error.code, "param": error.param})


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
async def chat_completions(request: Request, state: State) -> Response:
    """Answer a conversation."""
    body = ChatBody.parse(await request.body())
    return await respond(state, body, partial(ChatJob, body), _write, _on_error, _DONE)


@router.post("/v1/completions", openapi_extra=body_of(CompletionBody))
async def completions(request: Request, state: State) -> Response:
    """Continue texts."""
    body = CompletionBody.parse(await request.body())
    return await respond(state, body, partial(CompletionJob, body), _write, _on_error, _DONE)


@router.post("/v1/responses", openapi_extra=body_of(ResponsesBody))
async def responses(request: Request, state: State) -> Response:
    """Answer a conversation, in the shape of Responses; nothing is stored."""
    body = ResponsesBody.parse(await request.body())
    return await respond(state, body, partial(ResponsesJob, body), named_event, _on_response_error)
