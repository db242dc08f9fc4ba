"""Routes of Anthropic's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from exl_cli.server.errors import ApiError, openai_body

router = APIRouter()


def error_body(error: ApiError) -> dict[str, Any]:
    """The shape of Anthropic's errors."""
    return openai_body(error)
