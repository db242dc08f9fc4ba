"""The LangChain classes: drop-in for the notebook's class, chat templates, per-call options."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

pytest.importorskip("langchain_core", reason="needs exl-cli[langchain]")

from langchain_core.callbacks import BaseCallbackHandler, StreamingStdOutCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate
from pydantic import ValidationError
from shallow import shallow, shallow_gptq

from exl_cli import Model, Sampling, load
from exl_cli.errors import ExlError, ModelNotFoundError, PromptError, UsageError
from exl_cli.langchain import ChatExLlamaV2, ExLlamaV2

TEMPLATE = """Question: {question}

Answer: Let's think step by step."""
QUESTION = TEMPLATE.format(question="Who are you?")
ENGINE: dict[str, Any] = {"model": str(shallow()), "engine": "cpu"}
NOTEBOOK = {"temperature": 0.85, "top_k": 50, "top_p": 0.8, "token_repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The same model by the Python API, to compare with."""
    with load(str(shallow()), engine="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def llm() -> Iterator[ExLlamaV2]:
    made = ExLlamaV2(**ENGINE, seed=1, max_new_tokens=12)
    yield made
    made.release()


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatExLlamaV2]:
    made = ChatExLlamaV2(**ENGINE, seed=1, max_tokens=12)
    yield made
    made.release()


class Witness(BaseCallbackHandler):
    """Remembers what a callback is told."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.results: list[LLMResult] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.results.append(response)


def test_the_notebooks_lines_are_printed(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    llm = ExLlamaV2(
        model_path=str(shallow()),
        callbacks=[StreamingStdOutCallbackHandler()],
        verbose=True,
        settings=Sampling(**NOTEBOOK),
        streaming=True,
        max_new_tokens=40,
        engine="cpu",
        seed=4,
    )
    answer = (PromptTemplate(template=TEMPLATE, input_variables=["question"]) | llm).invoke(
        {"question": "Who are you?"}
    )
    llm.release()
    expected = model.generate(QUESTION, seed=4, max_new_tokens=40)
    assert answer == expected.text
    out, err = capsys.readouterr()
    head, _, numbers = out.partition(answer)
    assert head == f"{NOTEBOOK}\nLoading model: {shallow()}\nstop_sequences []\n"
    line = r"%s in \d+\.\d\d seconds, (\d+) tokens, \d+\.\d\d tokens/second\n"
    matched = re.fullmatch(r"\n\n" + line % "Prompt processed" + line % "Response generated", numbers)
    assert matched is not None, numbers
    assert int(matched[2]) == expected.summary.new_tokens
    assert err == ""


def test_every_way_of_asking_gives_the_same_text(llm: ExLlamaV2, model: Model) -> None:
    prompts = [QUESTION, "Once upon a time"]
    expected = [model.generate(prompt, seed=1, max_new_tokens=12).text for prompt in prompts]

    async def read() -> str:
        return "".join([piece async for piece in llm.astream(QUESTION)])

    pieces = list(llm.stream(QUESTION))
    assert len(pieces) > 3
    assert "".join(pieces) == llm.invoke(QUESTION) == asyncio.run(llm.ainvoke(QUESTION)) == expected[0]
    assert asyncio.run(read()) == expected[0]
    assert llm.batch(prompts) == asyncio.run(llm.abatch(prompts)) == expected
    assert llm.batch(prompts, config={"max_concurrency": 1}) == expected


@pytest.mark.parametrize("streaming", [True, False])
def test_callbacks_get_tokens_and_the_end(llm: ExLlamaV2, streaming: bool, capsys: pytest.CaptureFixture[str]) -> None:
    speaker, witness = llm.model_copy(update={"streaming": streaming}), Witness()
    text = speaker.invoke(QUESTION, config={"callbacks": [witness]})
    assert "".join(witness.tokens) == (text if streaming else "")
    (result,) = witness.results
    info = result.generations[0][0].generation_info
    assert (info["finish_reason"], info["new_tokens"], info["seed"]) == ("length", 12, 1)
    assert result.llm_output["token_usage"]["completion_tokens"] == 12
    told = Witness()
    assert "".join(speaker.stream(QUESTION, config={"callbacks": [told]})) == text == "".join(told.tokens)
    assert told.results[0].generations[0][0].generation_info["finish_reason"] == "length"
    assert capsys.readouterr() == ("", "")  # nothing unless asked for


def test_the_models_end_of_sequence_is_respected(llm: ExLlamaV2) -> None:
    for seed in range(10):
        result = llm.generate([QUESTION], max_new_tokens=120, seed=seed, model="fable-7m")
        if result.generations[0][0].generation_info["finish_reason"] == "stop":
            break
    else:
        pytest.fail("no response ended by itself")
    assert "<|im_end|>" not in result.generations[0][0].text


def test_stop_words_are_kept_as_written_and_honoured(llm: ExLlamaV2) -> None:
    text = llm.invoke("Once upon a time", max_new_tokens=30)
    word = next(word for word in re.findall(r"\w+", text) if word.lower() != word)
    shout = word.upper() if word.upper() != word else word.lower()
    before = text[: text.index(word)]
    stopping = ExLlamaV2(**ENGINE, seed=1, max_new_tokens=30, stop_sequences=[word])
    assert stopping.invoke("Once upon a time") == before
    assert "".join(stopping.stream("Once upon a time")) == before
    # A call's own stop words take their place.
    assert stopping.invoke("Once upon a time", stop=[shout]) == text
    assert llm.bind(stop=[word]).invoke("Once upon a time", max_new_tokens=30) == before
    stopping.release()


@pytest.mark.parametrize(
    ("call", "same"),
    [
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"seed": 9}, {"seed": 9}),
        ({"temperature": 2.0, "top_k": 0}, {"temperature": 2.0, "top_k": 0}),
        ({"settings": {"temperature": 2.0}, "top_p": 0.0}, {"temperature": 2.0, "top_p": 0.0}),
        ({"settings": Sampling(temperature=1.5)}, {"temperature": 1.5}),
    ],
)
def test_a_call_overrides_the_objects_settings(
    llm: ExLlamaV2, model: Model, call: dict[str, Any], same: dict[str, Any]
) -> None:
    expected = model.generate(QUESTION, **{"seed": 1, "max_new_tokens": 12, **same}).text
    assert llm.invoke(QUESTION, **call) == expected
    assert "".join(llm.bind(**call).stream(QUESTION)) == expected


def test_settings_in_each_of_their_forms(model: Model) -> None:
    expected = model.generate(QUESTION, seed=1, max_new_tokens=8, temperature=1.5, top_k=20).text
    for settings in (Sampling(temperature=1.5, top_k=20), {"temperature": 1.5, "top_k": 20}):
        # Parts of exllamav2 that are not given are fine.
        llm = ExLlamaV2(**ENGINE, seed=1, max_new_tokens=8, settings=settings, config=None, disallowed_tokens=None)
        assert (llm.model_path, llm.invoke(QUESTION)) == (str(shallow()), expected)
        llm.release()


def test_another_model_for_one_call(llm: ExLlamaV2) -> None:
    with load(shallow_gptq(), engine="cpu") as other:
        expected = other.generate(QUESTION, seed=1, max_new_tokens=12).text
    assert llm.invoke(QUESTION, model=str(shallow_gptq())) == expected != llm.invoke(QUESTION)


def test_identifying_params_say_all_that_matters(llm: ExLlamaV2) -> None:
    params = llm._identifying_params
    json.dumps(params)
    assert (params["model_name"], params["model_path"]) == (str(shallow()), str(shallow()))
    assert {**params["settings"], **NOTEBOOK} == params["settings"]
    changes = [{"seed": 2}, {"max_new_tokens": 13}, {"stop_sequences": ["a"]}, {"temperature": 1.0}]
    for change in [*changes, {"settings": {"min_p": 0.1}}]:
        assert llm.model_copy(update=change)._identifying_params != params


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"tokenizer": object()}, UsageError, "does not accept tokenizer"),
        ({"generator": object()}, UsageError, "does not accept generator"),
        ({"config": object()}, UsageError, "max_seq_len"),
        ({"exllama_cache": object()}, UsageError, "kv_cache"),
        ({"disallowed_tokens": [1]}, UsageError, "cannot ban"),
        ({"settings": {"temprature": 1}}, UsageError, "temprature"),
        ({"settings": object()}, UsageError, "no sampler settings"),
        ({"max_new_token": 5}, ValidationError, "max_new_token"),
        ({"max_new_tokens": 0}, ValidationError, "greater than or equal to 1"),
        ({"model": "owner/name"}, ModelNotFoundError, "owner/name"),
    ],
)
def test_unsupported_arguments_are_refused(
    arguments: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    for kind_of_model in (ExLlamaV2, ChatExLlamaV2):
        with pytest.raises(kind) as caught:
            kind_of_model(**{**ENGINE, "models_dir": tmp_path, **arguments})
        error = caught.value
        assert message in (f"{error.message}; {error.hint}" if isinstance(error, ExlError) else str(error))


def test_unknown_options_of_a_call_are_refused(llm: ExLlamaV2, chat: ChatExLlamaV2) -> None:
    with pytest.raises(UsageError, match="max_length"):
        llm.invoke(QUESTION, max_length=5)
    with pytest.raises(UsageError, match="does not accept tools"):
        chat.invoke("Hello", tools=[{"type": "function"}])
    with pytest.raises(TimeoutError):
        llm.invoke(QUESTION, timeout=0.0)


def test_tokens_are_counted_as_the_model_sees_them(llm: ExLlamaV2, chat: ChatExLlamaV2, exl2_dir: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(exl2_dir / "tokenizer.json"))
    assert llm.get_num_tokens(QUESTION) == len(backend.encode(QUESTION).ids)
    chatml = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.get_num_tokens_from_messages([HumanMessage("Hello")]) == len(backend.encode(chatml).ids)


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


def test_a_message_carries_metadata(chat: ChatExLlamaV2) -> None:
    answer = chat.invoke("Hello", max_tokens=7)
    meta = answer.response_metadata
    assert (meta["model_name"], meta["finish_reason"], meta["seed"]) == (str(shallow()), "length", 1)
    assert meta["prompt_seconds"] > 0 < meta["generation_tokens_per_second"]
    usage = answer.usage_metadata
    assert usage["output_tokens"] == 7
    assert usage["total_tokens"] == usage["input_tokens"] + 7
    word = re.findall(r"\w+", answer.content)[2]
    stopped = chat.invoke("Hello", stop=[word])
    assert stopped.content == answer.content[: answer.content.index(word)]
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert chat._get_ls_params(stop=[word])["ls_stop"] == [word]


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


def test_invoke_stream_and_batch_give_the_same_answer(chat: ChatExLlamaV2) -> None:
    questions = ["Hello", "Tell me a story"]
    answers = [chat.invoke(question).content for question in questions]
    assert [answer.content for answer in chat.batch(questions)] == answers
    assert [answer.content for answer in asyncio.run(chat.abatch(questions))] == answers
    told = Witness()
    streaming = ChatExLlamaV2(**ENGINE, seed=1, max_tokens=12, streaming=True)
    assert streaming.invoke("Hello", config={"callbacks": [told]}).content == answers[0] == "".join(told.tokens)
    streaming.release()


def test_a_batch_of_messages_runs_concurrently(chat: ChatExLlamaV2) -> None:
    count = 40  # more than LangChain starts threads by itself
    started = threading.Barrier(count, timeout=60)

    class Meeting(BaseCallbackHandler):
        raise_error = True

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            started.wait()

    answers = chat.batch(["Hello"] * count, {"callbacks": [Meeting()]}, max_tokens=1)
    assert len({answer.content for answer in answers}) == 1
    assert chat.batch([]) == []


def test_what_is_not_text_is_refused_and_tools_and_schemas_are_not_claimed(chat: ChatExLlamaV2) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(PromptError, match="image_url"):
        chat.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])
    with pytest.raises(NotImplementedError):
        chat.bind_tools([])
    with pytest.raises(NotImplementedError):
        chat.with_structured_output({"title": "answer", "type": "object", "properties": {}})
