"""Anthropic's Messages API: published shapes from scripted generations, and through the application."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from wireformats import PlainModel, chunks, events, fable, server, stream, with_template

from exl_cli.api.anthropic import CountBody, MessagesBody, MessagesJob
from exl_cli.errors import UsageError

MESSAGES = [{"role": "user", "content": "Hello, Claude"}]
TEMPLATE = """{% for t in tools or [] %}<tool>{{ t.function.name }} {{ t.function.parameters.type }}</tool>{% endfor %}
{% for m in messages %} [{{ m.role }}] {{ m.reasoning_content }}{{ m.content }}{% for c in m.tool_calls or [] %}
<call>{{ c.function.arguments.city }}</call>{% endfor %}
{% endfor %} {{ 'thinking=%s' % enable_thinking if enable_thinking is defined }}"""


@pytest.fixture(scope="module")
def model() -> PlainModel:
    return fable()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with server() as client:
        yield client


def job(model: PlainModel, **fields: Any) -> MessagesJob:
    return MessagesJob(MessagesBody.parse({"messages": MESSAGES, "max_tokens": 20, **fields}), model)


def prompt(model: PlainModel, **fields: Any) -> str:
    ids = job(model, **fields).requests[0].ids
    return model.tokenizer._backend.decode(list(ids), skip_special_tokens=False)


def test_a_message(model: PlainModel) -> None:
    asked = job(model)
    stream(asked, chunks("<think>", "hm", "</think>", "Hi"))
    result = asked.result()
    assert result["id"].startswith("msg_")
    assert {key: result[key] for key in ("type", "role", "model", "stop_reason", "stop_sequence", "content")} == {
        "type": "message", "role": "assistant", "model": "fable-7m", "stop_reason": "end_turn", "stop_sequence": None,
        "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Hi"}],
    }  # fmt: skip
    usage = result["usage"]
    assert usage["cache_read_input_tokens"] == 4
    assert usage["input_tokens"] == len(asked.requests[0].ids) - 4
    assert usage["output_tokens"] == 4


def test_a_streamed_message(model: PlainModel) -> None:
    got = stream(job(model), chunks("<think>", "hm", "</think>", "Hi"))
    assert [event["type"] for event in got] == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta",
        "content_block_stop", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    assert got[0]["message"]["content"] == []
    assert got[0]["message"]["stop_reason"] is None
    assert got[2] == {
        "type": "content_block_start", "index": 0,
        "content_block": {"type": "thinking", "thinking": "", "signature": ""},
    }  # fmt: skip
    assert got[4]["delta"] == {"type": "signature_delta", "signature": ""}
    assert got[7] == {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Hi"}}
    assert got[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert got[-2]["usage"]["output_tokens"] == 4


def test_thinking_that_was_turned_off_is_left_out(model: PlainModel) -> None:
    asked = job(model, thinking={"type": "disabled"})
    got = stream(asked, chunks("<think>", "hm", "</think>", "Hi"))
    assert asked.result()["content"] == [{"type": "text", "text": "Hi"}]
    assert not any(event.get("delta", {}).get("type") == "thinking_delta" for event in got)


def test_why_a_message_ended(model: PlainModel) -> None:
    cut = job(model, max_tokens=1)
    stream(cut, chunks("a", finish_reason="length"))
    assert cut.result()["stop_reason"] == "max_tokens"
    full = job(model, max_tokens=9999)
    full._model.context_length = len(full.requests[0].ids) + 1
    stream(full, chunks("a", finish_reason="length"))
    assert full.result()["stop_reason"] == "model_context_window_exceeded"
    full._model.context_length = 1024


def test_system_tools_and_their_history(model: PlainModel) -> None:
    text = prompt(
        with_template(model, TEMPLATE),
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        tools=[{"name": "weather", "input_schema": {"type": "object"}}],
        thinking={"type": "enabled", "budget_tokens": 1024},
        messages=[
            {"role": "user", "content": "How is it?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "I look. ", "signature": ""},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And?"},
            ]},
        ],
    )  # fmt: skip
    assert text == (
        "<tool>weather object</tool> [system] Be brief. [user] How is it?"
        " [assistant] I look. Wait.<call>Rome</call> [tool] sunny [user] And? thinking=True"
    )


def test_an_answer_is_continued(model: PlainModel) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The best answer is ("}]
    assert prompt(model, messages=messages).endswith("<|im_start|>assistant\nThe best answer is (")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"max_tokens": "5"},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"tool_choice": {"type": "any"}},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"top_p": 3},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(model: PlainModel, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        job(model, **fields)


def test_counting_takes_any_length_within_reason(model: PlainModel) -> None:
    long = CountBody.parse({"messages": [{"role": "user", "content": "word " * 2000}]})
    assert long.tokens(model)["input_tokens"] > 2000
    with pytest.raises(UsageError, match="the limit is 1,000,000"):
        CountBody.parse({"messages": [{"role": "user", "content": "word " * 200_000}]}).tokens(model)


def test_a_message_over_http(client: TestClient) -> None:
    body = {"model": "fable-7m", "messages": MESSAGES, "max_tokens": 8, "seed": 1, "unknown": 1}
    whole = client.post("/v1/messages", json=body)
    assert whole.headers["X-Exl-Ignored"] == "unknown"
    streamed = events(client.post("/v1/messages", json={**body, "stream": True}).text)
    assert all(name == data["type"] for name, data in streamed)
    text = "".join(data["delta"].get("text", "") for name, data in streamed if name == "content_block_delta")
    assert text == whole.json()["content"][0]["text"]
    count = client.post("/v1/messages/count_tokens", json={"messages": MESSAGES}).json()["input_tokens"]
    usage = whole.json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count


def test_a_stop_sequence_is_named(client: TestClient) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "seed": 1, "stop_sequences": ["zebra", "a"]}
    result = client.post("/v1/messages", json=body).json()
    assert (result["stop_reason"], result["stop_sequence"]) == ("stop_sequence", "a")


def test_a_request_for_the_prompt_alone(client: TestClient) -> None:
    result = client.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 0}).json()
    assert (result["content"], result["stop_reason"], result["usage"]["output_tokens"]) == ([], "max_tokens", 0)


def test_errors_have_anthropics_shape(client: TestClient) -> None:
    answer = client.post("/v1/messages", json={"messages": MESSAGES})
    assert answer.status_code == 400
    assert answer.json() == {
        "type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens is missing"},
    }  # fmt: skip
    answer = client.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 5, "model": "gpt"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
