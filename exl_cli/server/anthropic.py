"""Routes of Anthropic's API."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from exl_cli.api.anthropic import CountBody, MessagesBody, MessagesJob
from exl_cli.server.errors import ApiError
from exl_cli.server.generation import accept
from exl_cli.server.jobs import body_of, named_event, respond
from exl_cli.server.state import ServerState, server_state

router = APIRouter(tags=["Anthropic"])

State = Annotated[ServerState, Depends(server_state)]

# https://docs.anthropic.com/en/api/errors
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """The shape of Anthropic's errors."""
    kind = _TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


@router.post("/v1/messages", openapi_extra=body_of(MessagesBody))
async def messages(request: Request, state: State) -> Response:
    """Answer a conversation, in the shape of Anthropic's messages."""
    body = MessagesBody.parse(await request.body())
    return await respond(state, body, partial(MessagesJob, body), named_event, lambda e: named_event(error_body(e)))


@router.post("/v1/messages/count_tokens", openapi_extra=body_of(CountBody))
async def count_tokens(request: Request, state: State) -> dict[str, int]:
    """How many tokens a conversation comes to."""
    body = CountBody.parse(await request.body())
    async with accept(state, body.model) as model:
        return await model.in_thread(body.tokens, model)
