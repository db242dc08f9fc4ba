"""OpenAI's routes with fable-7m on the CPU, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shallow import shallow
from starlette.testclient import TestClient
from wireformats import events, server

from exl_cli import loader
from exl_cli.models.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with server() as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_a_seed_gives_the_same_text_streamed_alone_and_batched(client: TestClient) -> None:
    body = {"messages": MESSAGES, "max_tokens": 12, "seed": 5}
    alone = post(client, "chat/completions", **body)["choices"][0]["message"]["content"]
    several = post(client, "chat/completions", **{**body, "seed": 4, "n": 2})["choices"]
    assert several[1]["message"]["content"] == alone
    streamed = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert streamed.pop() == ("", "[DONE]")
    assert "".join(data["choices"][0]["delta"].get("content", "") for _, data in streamed) == alone


def test_answers_of_a_stream_come_by_their_index(client: TestClient) -> None:
    body = {"prompt": ["Once", "There"], "max_tokens": 4, "stream": True, "n": 2, "seed": 1}
    streamed = [data for _, data in events(client.post("/v1/completions", json=body).text) if data != "[DONE]"]
    texts = ["".join(d["choices"][0]["text"] for d in streamed if d["choices"][0]["index"] == i) for i in range(4)]
    whole = post(client, "completions", **{**body, "stream": False})
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) > 2


def test_the_log_probabilities_of_a_prompt_are_the_models(client: TestClient) -> None:
    info = loader.resolve(str(shallow()))
    tokenizer = Tokenizer(info.path)
    ids = tokenizer.encode("Once upon a time, there was a little fox.", add_special_tokens=True)
    body = {"prompt": [ids, ids[:4]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    choices = post(client, "completions", **body)["choices"]
    from exl_cli.api.model import load_resolved
    from exl_cli.models.load_options import LoadOptions

    with load_resolved(info, LoadOptions(engine="cpu")) as model:
        rows = torch.log_softmax(model._engine.logits(ids), -1)
    expected = [rows[i, id_].item() for i, id_ in enumerate(ids[1:])]
    logprobs = choices[0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected, abs=2e-3)
    likeliest = [max(top.values()) for top in logprobs["top_logprobs"][1:]]
    assert likeliest == pytest.approx(rows.max(-1).values.tolist(), abs=2e-3)
    assert len(choices[1]["logprobs"]["tokens"]) == 5
    assert "".join(logprobs["tokens"]) == choices[0]["text"]
    assert [
        choices[0]["text"][at:].startswith(t) for t, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    ]


def test_stop_min_tokens_and_logit_bias_work(client: TestClient) -> None:
    body = {"messages": MESSAGES, "max_tokens": 40, "seed": 2, "temperature": 0}
    free = post(client, "chat/completions", **body)["choices"][0]["message"]["content"]
    word = free.split()[3]
    stopped = post(client, "chat/completions", **body, stop=word)["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (free[: free.index(word)], "stop")
    banned = post(client, "chat/completions", **body, banned_strings=[word])["choices"][0]["message"]["content"]
    assert word.lower() not in banned.lower()
    tokenizer = Tokenizer(loader.resolve(None).path)
    first = tokenizer.encode(free, add_special_tokens=False)[0]
    biased = post(client, "chat/completions", **body, logit_bias={str(first): -100})["choices"][0]["message"]["content"]
    assert tokenizer.encode(biased, add_special_tokens=False)[0] != first
    longer = post(client, "chat/completions", **body, stop=word, min_tokens=20)
    assert longer["usage"]["completion_tokens"] >= 20


def test_max_tokens_defaults_to_the_rest_of_the_context(client: TestClient) -> None:
    long = [{"role": "user", "content": "word " * 980}]
    result = post(client, "chat/completions", messages=long, ignore_eos=True, temperature=0)
    assert result["usage"]["total_tokens"] == 1024
    assert result["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_beyond_the_context_is_refused_before_the_stream(client: TestClient, path: str, stream: bool) -> None:
    text = "word " * 3000
    field = {"chat/completions": {"messages": [{"role": "user", "content": text}]}, "completions": {"prompt": text}}
    answer = client.post(f"/v1/{path}", json={**field.get(path, {"input": text}), "stream": stream})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": MESSAGES, "temperature": "x"}, "temperature", "invalid_value"),
        ({}, "messages", "missing"),
        ({"messages": MESSAGES, "guidance_scale": 2}, "guidance_scale", "unsupported_parameter"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"messages": MESSAGES, "top_k": -5}, "top_k", "invalid_value"),
        ({"messages": MESSAGES, "temperature": -1}, "temperature", "invalid_value"),
        ({"messages": MESSAGES, "logit_bias": {"9999": 1}}, "logit_bias", "invalid_value"),
        ({"messages": MESSAGES, "banned_tokens": [9999]}, "banned_tokens", "invalid_value"),
    ],
    ids=str,
)
def test_errors_have_openais_shape(client: TestClient, body: dict[str, Any], param: str | None, code: str) -> None:
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 10_000, b'{"messages": NaN}', b"\xff\xfe", b'"\\ud800"'])
def test_a_body_that_is_no_json_is_a_400(client: TestClient, text: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("chat/completions", "completions", "responses", "messages"):
        assert client.post(f"/v1/{path}", content=text, headers=headers).status_code == 400


def test_ignored_fields_are_named_in_a_header(client: TestClient) -> None:
    body = {"prompt": "a", "max_tokens": 1, "odd\n": 1, "truncation_length": 5, "": 1, " ": 1, "a ": 1, "stream": True}
    assert client.post("/v1/completions", json=body).headers["X-Exl-Ignored"] == "truncation_length"


def test_the_document_names_fields_by_openais_names_and_exls(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "frequency_penalty", "token_frequency_penalty", "xtc_probability"} <= schema["properties"].keys()
    assert "$ref" not in str(schema)


def test_a_response_over_http(client: TestClient) -> None:
    body = {"input": "Tell me a story.", "max_output_tokens": 8, "seed": 1}
    whole = post(client, "responses", **body)
    streamed = events(client.post("/v1/responses", json={**body, "stream": True}).text)
    assert all(name == data["type"] for name, data in streamed)
    assert streamed[-1][0] == "response.incomplete"
    deltas = "".join(data["delta"] for name, data in streamed if name == "response.output_text.delta")
    assert deltas == whole["output"][0]["content"][0]["text"]
