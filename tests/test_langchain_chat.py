"""LangChain's chat model: messages through the template, streams and what is told of a response."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="needs exl-cli[langchain]")

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage

from exl_cli import Model, load
from exl_cli.errors import PromptError
from exl_cli.langchain import ChatExLlamaV2

ENGINE: dict[str, Any] = {"model": "fable-7m", "engine": "cpu"}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The same model by the Python API, to compare with."""
    with load("fable-7m", engine="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatExLlamaV2]:
    made = ChatExLlamaV2(**ENGINE, seed=1, max_tokens=12)
    yield made
    made.release()


class Tokens(BaseCallbackHandler):
    """Remembers the tokens that a callback is told of."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.seen.append(token)


def test_messages_of_every_kind_go_through_the_template(chat: ChatExLlamaV2, model: Model) -> None:
    call = {"name": "look", "args": {"where": "up"}, "id": "1"}
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "Look "}, {"type": "text", "text": "up."}]),
        AIMessage("I look.", tool_calls=[call]),
        ToolMessage("The sky.", tool_call_id="1"),
        HumanMessage("And?", name="Ann"),
    ]
    turns = {"system": "Be brief.", "user": "Look up.", "assistant": "I look.", "tool": "The sky."}
    turns = [*turns.items(), ("user", "And?")]
    written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    answer = chat.invoke(messages)
    expected = model.generate(written, seed=1, max_new_tokens=12)
    assert answer.content == expected.text
    assert answer.usage_metadata["input_tokens"] == expected.summary.prompt_tokens == len(model.encode(written))


def test_a_message_says_how_it_came_about(chat: ChatExLlamaV2) -> None:
    answer = chat.invoke("Hello", max_tokens=7)
    meta = answer.response_metadata
    assert (meta["model_name"], meta["finish_reason"], meta["seed"]) == ("fable-7m", "length", 1)
    assert meta["prompt_seconds"] > 0 < meta["generation_tokens_per_second"]
    usage = answer.usage_metadata
    assert usage["output_tokens"] == 7
    assert usage["total_tokens"] == usage["input_tokens"] + 7


def test_streams_end_with_one_chunk_of_usage(chat: ChatExLlamaV2) -> None:
    async def read() -> list[AIMessageChunk]:
        return [chunk async for chunk in chat.astream("Hello")]

    whole = chat.invoke("Hello")
    for chunks in (list(chat.stream("Hello")), asyncio.run(read())):
        assert len(chunks) > 3
        assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].chunk_position == "last"
        assert "".join(chunk.content for chunk in chunks) == whole.content
        assert chunks[-1].usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def test_chat_answers_alike_however_it_is_asked(chat: ChatExLlamaV2) -> None:
    questions = ["Hello", "Tell me a story"]
    answers = [chat.invoke(question).content for question in questions]
    assert [answer.content for answer in chat.batch(questions)] == answers
    assert [answer.content for answer in asyncio.run(chat.abatch(questions))] == answers
    told = Tokens()
    streaming = ChatExLlamaV2(**ENGINE, seed=1, max_tokens=12, streaming=True)
    assert streaming.invoke("Hello", config={"callbacks": [told]}).content == answers[0] == "".join(told.seen)
    streaming.release()


def test_chat_stops_where_it_is_told(chat: ChatExLlamaV2) -> None:
    text = chat.invoke("Hello", max_tokens=20).content
    word = re.findall(r"\w+", text)[4]
    answer = chat.invoke("Hello", max_tokens=20, stop=[word])
    assert answer.content == text[: text.index(word)]
    assert answer.response_metadata["finish_reason"] == "stop"
    assert chat._get_ls_params(stop=[word])["ls_stop"] == [word]


def test_what_is_not_text_is_refused(chat: ChatExLlamaV2) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(PromptError, match="image_url"):
        chat.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])


def test_tools_and_schemas_are_not_claimed(chat: ChatExLlamaV2) -> None:
    with pytest.raises(NotImplementedError):
        chat.bind_tools([])
    with pytest.raises(NotImplementedError):
        chat.with_structured_output({"title": "answer", "type": "object", "properties": {}})
