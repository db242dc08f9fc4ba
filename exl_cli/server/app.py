"""The application: its routes, and errors in the shapes of their surfaces."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from exl_cli.errors import ExlError
from exl_cli.server import anthropic, openai
from exl_cli.server.errors import ApiError, ErrorBody, as_api_error, openai_body
from exl_cli.server.state import ServerState
from exl_cli.system.version import installed_version

# By the beginning of the path; OpenAI's elsewhere.
_ERROR_BODIES: Mapping[str, ErrorBody] = {"/v1/messages": anthropic.error_body}


def create_app(state: ServerState) -> FastAPI:
    """The application over a server's state."""
    app = FastAPI(title="exl", version=installed_version(), redoc_url=None)
    app.state.server = state
    app.include_router(openai.router)
    app.include_router(anthropic.router)
    for kind in (ApiError, ExlError, Exception):
        app.add_exception_handler(kind, _error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


def error_response(path: str, error: ApiError) -> Response:
    """An error in the shape of the surface that the path belongs to."""
    body = next((body for prefix, body in _ERROR_BODIES.items() if path.startswith(prefix)), openai_body)
    return JSONResponse(body(error), error.status, error.headers)


def _error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, as_api_error(error))


def _http_error(request: Request, error: Exception) -> Response:
    """Of the framework: no such route or method, a body that cannot be read."""
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
    headers = getattr(error, "headers", None)
    return error_response(
        request.url.path, ApiError(status, f"{request.method} {request.url.path}: {detail}", headers=headers)
    )


def _invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or has fields of wrong types: 400, as OpenAI's clients expect, with the first fault."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = ".".join(str(part) for part in first.get("loc", ())[1:])
    message = first.get("msg", "invalid request")
    if first.get("type") == "json_invalid":
        place, message = "", "the body is not JSON"
    return error_response(
        request.url.path, ApiError(400, f"{place}: {message}" if place else message, param=place or None)
    )
