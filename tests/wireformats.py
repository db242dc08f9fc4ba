"""The built-in model for the wire format tests, without an engine and behind the application in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from shallow import shallow
from starlette.testclient import TestClient

from exl_cli import loader
from exl_cli.engines.base import Chunk, Summary
from exl_cli.models.chat_template import Format, load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.server.app import create_app
from exl_cli.server.pool import Catalog, ModelPool
from exl_cli.server.state import ServerState


@dataclass
class PlainModel:
    """A model without an engine; see `api.prompts.TextModel`."""

    info: ModelInfo
    tokenizer: Tokenizer
    chat_format: Format
    name: str = "fable-7m"
    context_length: int = 1024


def fable() -> PlainModel:
    info = loader.resolve(None)
    return PlainModel(info, Tokenizer(info.path), load_format(info.path))


def with_template(model: PlainModel, source: str) -> PlainModel:
    """The same model with another chat template."""
    from exl_cli.models.chat_template import ChatTemplate

    return PlainModel(model.info, model.tokenizer, ChatTemplate(source))


def chunks(*texts: str, finish_reason: Any = "stop", prompt_tokens: int = 9, reused: int = 4) -> list[Chunk]:
    """A generation of one token a text, and its end."""
    summary = Summary(finish_reason, prompt_tokens, reused, len(texts), 0.1, 0.1, 0.1)
    return [*(Chunk(text, (100 + i,)) for i, text in enumerate(texts)), Chunk("", (), summary)]


def stream(job: Any, generation: list[Chunk]) -> list[dict[str, Any]]:
    """The events of a job with one request."""
    return [*(event for chunk in generation for event in job.push(0, chunk)), *job.end()]


class _Silent:
    def note(self, message: str) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass


@contextmanager
def application(**models: str | None) -> Iterator[FastAPI]:
    """The application over models by name, `shallow` as fable-7m where none is given, on the CPU."""
    served = {name: loader.resolve(path) for name, path in (models or {"fable-7m": str(shallow())}).items()}
    state = ServerState(ModelPool(Catalog(served), LoadOptions(engine="cpu"), _Silent()))
    state.phase = "ok"
    yield create_app(state)
    for model in state.pool.loaded:
        model.engine.close()


@contextmanager
def server() -> Iterator[TestClient]:
    """A client of the application, in this process."""
    with application() as app, TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events: names and data, parsed unless it is [DONE]."""
    parsed = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            parsed.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return parsed
