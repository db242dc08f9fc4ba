"""Routes about the server and its models: health, metrics, the list of models, and TabbyAPI's own with their kin.

TabbyAPI's bodies: https://theroyallab.github.io/tabbyAPI. `/tokenize` and `/detokenize` take and give the fields of
both vLLM and llama.cpp's server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.responses import Response

from exl_cli.api.prompts import MAX_CHARACTERS
from exl_cli.errors import PromptError
from exl_cli.models.prompt import half_character
from exl_cli.server.errors import ApiError, openai_body
from exl_cli.server.generation import event_stream, sse
from exl_cli.server.pool import ServedModel
from exl_cli.server.state import ServerState, server_state
from exl_cli.system.version import installed_version

router = APIRouter()
State = Annotated[ServerState, Depends(server_state)]

_PAGE = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>exl</title>
<style>body{{font:16px/1.5 system-ui;max-width:40em;margin:3em auto;padding:0 1em}}code{{background:#8882}}</style>
<h1>exl {installed_version()}</h1>
<p>This server speaks the APIs of OpenAI (<code>/v1/chat/completions</code>, <code>/v1/completions</code>,
<code>/v1/responses</code>), Anthropic (<code>/v1/messages</code>) and TabbyAPI (<code>/v1/model</code>).</p>
<p>In OpenAI clients, set the base URL to this address plus <code>/v1</code>.</p>
<ul><li><a href="docs">API reference</a><li><a href="v1/models">Models</a><li><a href="health">Health</a>
<li><a href="metrics">Metrics</a></ul>
"""


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> HTMLResponse:
    """What this is, for a person with a browser."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(state: State) -> JSONResponse:
    """200 once models are loaded and warm; 503 before, while the server stops, and after a fault of the GPU."""
    return JSONResponse({"status": state.phase}, 200 if state.phase == "ok" else 503)


@router.get("/metrics")
async def metrics(state: State) -> Response:
    """Counters and gauges for Prometheus."""
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
@router.get("/v1/model/list", include_in_schema=False)
async def models(state: State) -> dict[str, Any]:
    """The models that a request may name."""
    names = await asyncio.to_thread(state.pool.catalog.names)
    return {"object": "list", "data": [_card(state, name) for name in names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, state: State) -> dict[str, Any]:
    """One of them."""
    if name not in await asyncio.to_thread(state.pool.catalog.names):
        raise ApiError(404, f"no model named {name!r}", "model_not_found", "model")
    return _card(state, name)


def _card(state: ServerState, name: str) -> dict[str, Any]:
    own = state.pool.catalog.named(name) or name
    loaded = next((model for model in state.pool.loaded if model.name == own), None)
    length = loaded.context_length if loaded else None
    return {
        "id": name,
        "object": "model",
        "created": loaded.created if loaded else state.started,
        "owned_by": "exl",
        "max_model_len": length,
        "loaded": loaded is not None,
        "parameters": {"max_seq_len": length, **({"engine": loaded.engine.name} if loaded else {})},
    }


# --- TabbyAPI's -------------------------------------------------------------------------------------------------------


@router.get("/v1/model")
async def current_model(state: State) -> dict[str, Any]:
    """The model in memory, of several the one used last; with none there, the default, which a request would load."""
    in_use = max(state.pool.loaded, key=lambda model: (model.users > 0, model.last_used), default=None)
    return _card(state, state.pool.catalog.default if in_use is None else in_use.name)


class LoadRequest(BaseModel):
    """Which model to load, under either of TabbyAPI's names for it. How it is loaded was said when the server began."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: str = Field(validation_alias=AliasChoices("name", "model_name"))


@router.post("/v1/model/load")
async def load_model(body: LoadRequest, state: State) -> Response:
    """Load a model: events that say how far it is, as TabbyAPI sends them."""

    def event(module: int, status: str) -> str:
        return sse(json.dumps({"model_type": "model", "module": module, "modules": 1, "status": status}))

    async def events() -> AsyncIterator[str]:
        async with state.use(body.name):
            yield event(1, "processing")
            yield event(1, "finished")

    return await event_stream(state, events(), lambda error: sse(json.dumps(openai_body(error))))


@router.post("/v1/model/unload")
async def unload_model(state: State) -> dict[str, Any]:
    """Unload all models that no request uses; the next request loads its own again."""
    busy = [model.name for model in state.pool.loaded if not await state.pool.unload(model.name)]
    if busy:
        raise ApiError(409, f"in use: {', '.join(busy)}", "model_in_use", headers={"Retry-After": "5"})
    return {"status": "unloaded"}


class EncodeRequest(BaseModel):
    """A text, or messages for the chat template, to become tokens."""

    model: str | None = None
    text: str | list[dict[str, Any]] | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_bos_token: bool | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool | None = None


class DecodeRequest(BaseModel):
    """Tokens to become text."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_CHARACTERS)


@router.post("/v1/token/encode")
async def encode(body: EncodeRequest, state: State) -> dict[str, Any]:
    """Tokens of a text, or of messages; a special token written in a text is one."""
    return await _encoded(body, state, add_generation_prompt=False, add_special=True)


@router.post("/tokenize")
async def tokenize(body: EncodeRequest, state: State) -> dict[str, Any]:
    """The same with the defaults of vLLM, or with "content" those of llama.cpp."""
    return await _encoded(body, state, add_generation_prompt=True, add_special=body.content is None)


@router.post("/v1/token/decode")
@router.post("/detokenize")
async def decode(body: DecodeRequest, state: State) -> dict[str, Any]:
    """The text of tokens."""
    async with state.use(body.model) as model:
        size = model.tokenizer.vocab_size
        wrong = next((id_ for id_ in body.tokens if not 0 <= id_ < size), None)
        if wrong is not None:
            raise ApiError(400, f"{wrong} is not a token of {model.name}; its ids are below {size:,}", param="tokens")
        text = await model.in_thread(model.tokenizer.decode, body.tokens)
    return {"text": text, "prompt": text, "content": text}


async def _encoded(
    body: EncodeRequest, state: ServerState, *, add_generation_prompt: bool, add_special: bool
) -> dict[str, Any]:
    given = next((value for value in (body.text, body.prompt, body.content, body.messages) if value is not None), None)
    if given is None:
        raise ApiError(400, "nothing to tokenize; send text, prompt, content or messages", param="text")
    for said in (body.add_special_tokens, body.add_special, body.add_bos_token):
        add_special = add_special if said is None else said
    if body.add_generation_prompt is not None:
        add_generation_prompt = body.add_generation_prompt
    async with state.use(body.model) as model:
        ids = await model.in_thread(_encode, model, given, add_special, add_generation_prompt)
        return {"tokens": ids, "length": len(ids), "count": len(ids), "max_model_len": model.context_length}


def _encode(model: ServedModel, given: str | list[dict[str, Any]], add_special: bool, header: bool) -> list[int]:
    if isinstance(given, str):
        text = given
    else:
        if not all(isinstance(message.get("role"), str) and "content" in message for message in given):
            raise PromptError("each message needs a role and content")
        messages = model.tokenizer.as_text_messages(given)
        try:
            text = model.chat_format.render(messages, add_generation_prompt=header)
        except TypeError as error:
            raise PromptError(str(error), "send each message's content as text") from None
        add_special = model.chat_format.add_special_tokens
    if len(text) > MAX_CHARACTERS:
        raise ApiError(413, f"the text has {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
    if half := half_character(text):
        raise PromptError(f"the text contains a lone surrogate, {half}", "remove it")
    return model.tokenizer.encode(text, add_special_tokens=add_special)
