"""OpenAI's chat completions, completions and responses: published shapes from scripted generations."""

from __future__ import annotations

from typing import Any

import pytest
from wireformats import PlainModel, chunks, fable, stream

from exl_cli.api.openai import ChatBody, ChatJob, CompletionBody, CompletionJob
from exl_cli.api.responses import ResponsesBody, ResponsesJob
from exl_cli.engines.base import Chunk, TokenLogprobs

MESSAGES = [{"role": "user", "content": "Hello"}]
THINKING = ("<think>", "\nWell", "</think>", "\n\nHi", " there")


@pytest.fixture(scope="module")
def model() -> PlainModel:
    return fable()


def chat(model: PlainModel, **fields: Any) -> ChatJob:
    return ChatJob(ChatBody.parse({"messages": MESSAGES, **fields}), model)


def completion(model: PlainModel, **fields: Any) -> CompletionJob:
    return CompletionJob(CompletionBody.parse({"prompt": "Once", **fields}), model)


def responses(model: PlainModel, **fields: Any) -> ResponsesJob:
    return ResponsesJob(ResponsesBody.parse({"input": "Hello", **fields}), model)


def with_logprobs(*tokens: tuple[int, str, float]) -> list[Chunk]:
    """A generation with log-probabilities; token 5 is the likeliest everywhere."""
    generation = [Chunk(text, (id_,), None, (TokenLogprobs(id_, p, ((5, -0.1), (id_, p))),)) for id_, text, p in tokens]
    return [*generation, *chunks("")[-1:]]


def test_a_chat_completion(model: PlainModel) -> None:
    job = chat(model)
    stream(job, chunks(*THINKING))
    result = job.result()
    assert result["object"] == "chat.completion"
    assert result["id"].startswith("chatcmpl-")
    (choice,) = result["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "Hi there", "refusal": None,
        "reasoning_content": "\nWell", "reasoning": "\nWell",
    }  # fmt: skip
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = result["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


def test_a_chat_completion_that_the_limit_cut(model: PlainModel) -> None:
    job = chat(model)
    stream(job, chunks("a", finish_reason="length"))
    assert job.result()["choices"][0]["finish_reason"] == "length"


def test_a_streamed_chat_completion(model: PlainModel) -> None:
    events = stream(chat(model, stream=True, stream_options={"include_usage": True}), chunks(*THINKING))
    *deltas, last, usage = events
    assert all(event["object"] == "chat.completion.chunk" and event["id"] == events[0]["id"] for event in events)
    assert deltas[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in deltas) == "Hi there"
    assert "".join(event["choices"][0]["delta"].get("reasoning_content", "") for event in deltas) == "\nWell"
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(event["usage"] is None for event in (*deltas, last))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5


def test_usage_in_every_event_and_in_none(model: PlainModel) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(chat(model, stream=True, stream_options=options), chunks("a", "b"))
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 2, 2]
    assert not any("usage" in event for event in stream(chat(model, stream=True), chunks("a")))


def test_log_probabilities_of_a_chat_completion(model: PlainModel) -> None:
    job = chat(model, logprobs=True, top_logprobs=2)
    assert job.requests[0].logprobs == 2
    stream(job, with_logprobs((60, "Y", -1.5), (61, "Z", -float("inf"))))
    first, second = job.result()["choices"][0]["logprobs"]["content"]
    token = model.tokenizer.token_bytes(60)
    other = model.tokenizer.token_bytes(5)
    assert first == {
        "token": token.decode(), "logprob": -1.5, "bytes": list(token),
        "top_logprobs": [
            {"token": other.decode(), "logprob": -0.1, "bytes": list(other)},
            {"token": token.decode(), "logprob": -1.5, "bytes": list(token)},
        ],
    }  # fmt: skip
    assert second["logprob"] == -9999.0  # OpenAI's number for what cannot come


def test_a_completion(model: PlainModel) -> None:
    job = completion(model)
    stream(job, chunks("<think>", " upon"))
    result = job.result()
    assert result["object"] == "text_completion"
    assert result["id"].startswith("cmpl-")
    assert result["choices"] == [{"index": 0, "text": "<think> upon", "logprobs": None, "finish_reason": "stop"}]


def test_special_tokens_of_a_completion_are_shown_when_asked_for(model: PlainModel) -> None:
    special = model.tokenizer.token_id("<|im_start|>")
    generation = [Chunk("a", (60, special)), *chunks("")[-1:]]
    hidden, shown = completion(model), completion(model, skip_special_tokens=False)
    for job in (hidden, shown):
        stream(job, generation)
    assert hidden.result()["choices"][0]["text"] == "a"
    assert shown.result()["choices"][0]["text"] == "a<|im_start|>"


@pytest.mark.parametrize("most", [0, 1])
def test_the_log_probabilities_of_a_prompt(model: PlainModel, most: int) -> None:
    """The shape that lm-evaluation-harness reads: None for the first token, the likeliest beside each token."""
    ids = model.tokenizer.encode("Once upon a", add_special_tokens=True)
    job = completion(model, prompt=ids, echo=True, logprobs=1, max_tokens=most)
    assert job.requests[0].prompt_logprobs == 1
    of_prompt = tuple(TokenLogprobs(id_, -1.0 - i, ((5, -0.1),)) for i, id_ in enumerate(ids[1:]))
    of_answer = TokenLogprobs(60, -7.0, ((60, -7.0),))
    stream(job, [Chunk("Y", (60,), None, (of_answer,), of_prompt), *chunks("", finish_reason="length")[-1:]])
    choice, usage = job.result()["choices"][0], job.result()["usage"]
    logprobs, generated = choice["logprobs"], [-7.0][:most]
    assert choice["text"] == "Once upon a" + "Y" * most
    assert "".join(logprobs["tokens"][: len(ids)]) == "Once upon a"
    assert logprobs["token_logprobs"] == [None, *(-1.0 - i for i in range(len(ids) - 1)), *generated]
    assert logprobs["top_logprobs"][0] is None
    assert max(logprobs["top_logprobs"][1].values()) == -0.1
    assert logprobs["top_logprobs"][1][logprobs["tokens"][1]] == -1.0
    assert logprobs["text_offset"][:3] == [0, 4, 9]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), most)
    assert choice["finish_reason"] == "length"


def test_pieces_of_a_character_are_named_by_their_bytes(model: PlainModel) -> None:
    ids = model.tokenizer.encode("\U0001f98a", add_special_tokens=False)
    assert b"".join(map(model.tokenizer.token_bytes, ids)) == "\U0001f98a".encode()
    job = completion(model, logprobs=0)
    stream(job, with_logprobs((ids[0], "", -1.0)))
    assert job.result()["choices"][0]["logprobs"]["tokens"][0].startswith("bytes:\\xf0")


def test_each_prompt_of_a_body_counts_once(model: PlainModel) -> None:
    job = completion(model, prompt=["Once", "Twice"], n=2)
    for index in range(4):
        for chunk in chunks("a"):
            job.push(index, chunk)
    result = job.result()
    assert [choice["index"] for choice in result["choices"]] == [0, 1, 2, 3]
    assert result["usage"]["prompt_tokens"] == sum(len(job.requests[i].ids) for i in (0, 2))
    assert result["usage"]["completion_tokens"] == 4


# https://platform.openai.com/docs/api-reference/responses-streaming, in the order of a response that reasons.
RESPONSE_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_a_streamed_response(model: PlainModel) -> None:
    job = responses(model, stream=True)
    events = stream(job, chunks(*THINKING))
    assert [event["type"] for event in events] == RESPONSE_EVENTS
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["output_index"] for event in events[2:-1]] == [0] * 6 + [1] * 7
    done = events[-1]["response"]
    assert done["status"] == "completed"
    assert [item["type"] for item in done["output"]] == ["reasoning", "message"]
    assert done["output"][0]["content"] == [{"type": "reasoning_text", "text": "\nWell"}]
    (text,) = done["output"][1]["content"]
    assert text == {"type": "output_text", "text": "Hi there", "annotations": [], "logprobs": []}
    assert done["usage"]["output_tokens"] == 5
    assert done["usage"]["input_tokens_details"]["cached_tokens"] == 4


def test_a_response_that_the_limit_cut(model: PlainModel) -> None:
    job = responses(model, max_output_tokens=1)
    events = stream(job, chunks("a", finish_reason="length"))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


def test_a_response_without_a_word_has_a_message(model: PlainModel) -> None:
    job = responses(model)
    stream(job, chunks())
    assert job.result()["output"][0]["content"][0]["text"] == ""


def test_items_of_a_response_come_back_as_the_next_input(model: PlainModel) -> None:
    job = responses(model)
    stream(job, chunks(*THINKING))
    history = [{"role": "user", "content": "Hello"}, *job.result()["output"], {"role": "user", "content": "More"}]
    ids = responses(model, input=history, instructions="Be kind.").requests[0].ids
    text = model.tokenizer._backend.decode(list(ids), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"background": True},
        {"truncation": "auto"},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}},
        {"tool_choice": "required"},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a"}]}]},
        {"n": 2},
    ],
    ids=str,
)
def test_what_needs_a_store_or_more_than_text_is_refused(model: PlainModel, fields: dict[str, Any]) -> None:
    from exl_cli.errors import UsageError

    with pytest.raises(UsageError):
        responses(model, **fields)
