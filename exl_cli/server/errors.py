"""Errors as HTTP answers: statuses, and the body that OpenAI's clients read.

Wire format: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exl_cli.errors import (
    ContextLengthError,
    DamagedModelError,
    EngineError,
    ExlError,
    ModelNotFoundError,
    OutOfMemoryError,
    PromptError,
    UnsupportedModelError,
    UsageError,
    spell,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

# The first that fits counts.
_STATUSES: tuple[tuple[type[ExlError], int, str | None], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (PromptError, 400, None),
    (UsageError, 400, None),
    (ModelNotFoundError, 404, "model_not_found"),
    (OutOfMemoryError, 503, "out_of_memory"),
    (UnsupportedModelError, 503, "model_not_loaded"),
    (DamagedModelError, 503, "model_not_loaded"),
    (EngineError, 500, "engine_failed"),
)

# For what failed for want of room: seconds after which a client may try again.
RETRY_AFTER = {"Retry-After": "5"}


class ApiError(Exception):
    """An HTTP status with what a client should read.

    Args:
        status: 400 or more.
        message: what is wrong and the next step. `param` marks are options of the server: its log writes them as flags,
            clients read the bare names.
        code: a word for programs, such as "context_length_exceeded".
        param: the field of the request that is wrong.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.marked = message
        self.message = spell(message)
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        return _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")


# An error's body, in the shape that the clients of a surface read.
ErrorBody = Callable[[ApiError], dict[str, Any]]


def openai_body(error: ApiError) -> dict[str, Any]:
    """The shape of OpenAI's errors."""
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as what its client is told; that of a bug says nothing of its insides."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            # What is wrong with a body says which field it is; see `api.bodies.BodyError`.
            code, field = code or getattr(error, "code", None), getattr(error, "field", None)
            return ApiError(status, str(error), code, field or None, headers=RETRY_AFTER if status == 503 else None)
    return ApiError(500, "internal error; see the server's log", "internal_error")
