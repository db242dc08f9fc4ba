"""The application: its routes, what stands before them, and errors in the shapes of their surfaces."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from exl_cli.api.validation import first_fault
from exl_cli.errors import ExlError
from exl_cli.server import anthropic, openai, routes
from exl_cli.server.errors import ApiError, ErrorBody, as_api_error, openai_body
from exl_cli.server.gate import Gate, Policy
from exl_cli.server.state import ServerState, Usage, usage
from exl_cli.system.version import installed_version

# By the beginning of the path; OpenAI's elsewhere.
_ERROR_BODIES: Mapping[str, ErrorBody] = {"/v1/messages": anthropic.error_body}


def create_app(state: ServerState, policy: Policy | None = None) -> FastAPI:
    """The application over a server's state; without a policy, all may ask who can reach it."""
    policy = policy or Policy()
    app = FastAPI(title="exl", version=installed_version(), redoc_url=None)
    app.state.server = state
    for part in (openai, anthropic, routes):
        app.include_router(part.router)
    for kind in (ApiError, ExlError):
        app.add_exception_handler(kind, _error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Gate, state=state, policy=policy, respond=error_response)
    if policy.origins:
        # Outermost: a preflight has no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(policy.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            max_age=3600,
        )
    return app


def error_response(path: str, error: ApiError) -> Response:
    """An error in the shape of the surface that the path belongs to."""
    usage.get(Usage()).error = error.marked
    body = next((body for prefix, body in _ERROR_BODIES.items() if path.startswith(prefix)), openai_body)
    return JSONResponse(body(error), error.status, error.headers)


def _error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    request.app.state.server.report(answer, error)
    return error_response(request.url.path, answer)


def _http_error(request: Request, error: Exception) -> Response:
    """Of the framework: no such route or method, a body that cannot be read."""
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
    said = f"{request.method} {request.url.path}: {detail}"
    if status == 404:
        said = f"there is no route {request.url.path}; see / for the APIs of this server"
    elif status == 405 and (allowed := (getattr(error, "headers", None) or {}).get("Allow")):
        said = f"{request.url.path} does not accept {request.method}; use {allowed.replace(', ', ' or ')}"
    return error_response(request.url.path, ApiError(status, said, headers=getattr(error, "headers", None)))


def _invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or has fields of wrong types: 400, as OpenAI's clients expect, with the first fault."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    if not errors or errors[0]["type"] == "json_invalid":
        return error_response(request.url.path, ApiError(400, "the body is not valid JSON", "invalid_json"))
    fault = first_fault([{**each, "loc": each["loc"][1:]} for each in errors])  # without "body"
    said, code = f"{fault.field or 'the body'} {fault.problem}", "missing" if fault.is_missing else "invalid_value"
    return error_response(request.url.path, ApiError(400, said, code, param=fault.field or None))
