"""Clients' message formats, rendered by chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from wireformats import PlainModel, fable, with_template

from exl_cli.api.bodies import BodyError
from exl_cli.api.openai import ChatBody, ChatJob
from exl_cli.errors import ContextLengthError, PromptError, UsageError
from exl_cli.models.chat_template import PlainFormat

# As Mistral's and Gemma's do.
STRICT = """{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must
be at the beginning.') }}{% endif %}[{{ m.role }}] {{ m.content }}
{% endfor %}"""
# As Llama 2's: a second system message is left out without a word.
FIRST_ONLY = """{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.role }}] {{ m.content }}
{% endif %}{% endfor %}"""
WITH_TOOLS = """{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}{% for m in messages %}
[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}
 {{ c.function.arguments.city }}</call>{% endfor %}{% endfor %}
{{ ' thinking=%s' % enable_thinking if enable_thinking is defined }}"""


@pytest.fixture(scope="module")
def model() -> PlainModel:
    return fable()


def prompt(model: PlainModel, *messages: dict[str, Any], **fields: Any) -> str:
    job = ChatJob(ChatBody.parse({"messages": list(messages), **fields}), model)
    return model.tokenizer._backend.decode(list(job.requests[0].ids), skip_special_tokens=False)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_a_conversation_goes_through_the_template(model: PlainModel) -> None:
    text = prompt(model, {"role": "developer", "content": "Be brief."}, user("Hi"))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_of_a_user_are_text(model: PlainModel) -> None:
    job = ChatJob(ChatBody.parse({"messages": [user("<|im_end|>")]}), model)
    assert job.requests[0].ids.count(model.tokenizer.token_id("<|im_end|>")) == 1


def test_parts_of_text_are_lines(model: PlainModel) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in prompt(model, user(parts))


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused(model: PlainModel, kind: str) -> None:
    with pytest.raises(BodyError, match=r"images are not supported|is not supported"):
        prompt(model, user([{"type": kind, kind: {"url": "data:image/png;base64,AA=="}}]))


@pytest.mark.parametrize("template", [STRICT, FIRST_ONLY], ids=["refused", "left out"])
def test_later_system_messages_are_merged_where_the_template_takes_one(model: PlainModel, template: str) -> None:
    strict = with_template(model, template)
    messages = ({"role": "system", "content": "A."}, user("Hi"), {"role": "developer", "content": "B."})
    assert prompt(strict, *messages) == "[system] A.\n\nB.\n[user] Hi\n"


def test_later_system_messages_stay_where_the_template_takes_them(model: PlainModel) -> None:
    text = prompt(model, user("Hi"), {"role": "system", "content": "B."})
    assert text.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>system\nB.")


def test_tools_and_their_history_reach_a_template_that_knows_them(model: PlainModel) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    text = prompt(
        with_template(model, WITH_TOOLS),
        user("How is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        tools=tools,
    )
    assert "<tool>weather</tool>" in text
    assert "<call>weather\n Rome</call>" in text
    assert "[tool] sunny" in text


def test_tools_are_refused_by_a_template_that_has_no_place_for_them(model: PlainModel) -> None:
    with pytest.raises(BodyError, match="does not support tools"):
        prompt(model, user("Hi"), tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(BodyError, match="cannot be required"):
        prompt(with_template(model, WITH_TOOLS), user("Hi"), tool_choice="required")


def test_variables_of_the_template(model: PlainModel) -> None:
    thinking = with_template(model, WITH_TOOLS)
    assert prompt(thinking, user("Hi"), chat_template_kwargs={"enable_thinking": False}).endswith("thinking=False")
    for variables in ({"messages": []}, {"bos_token": "x"}, {"a": "b" * 70_000}):
        with pytest.raises(BodyError, match="chat_template_kwargs"):
            prompt(thinking, user("Hi"), chat_template_kwargs=variables)


def test_an_answer_is_continued(model: PlainModel) -> None:
    begun = {"role": "assistant", "content": "Once upon"}
    text = prompt(model, user("Hi"), begun, continue_final_message=True, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nOnce upon")
    assert prompt(model, user("Hi"), begun, add_generation_prompt=False).endswith("Once upon<|im_end|>\n")
    with pytest.raises(BodyError, match="no assistant message to continue"):
        prompt(model, user("Hi"), continue_final_message=True)


def test_a_model_without_a_template_gets_plain_turns(model: PlainModel) -> None:
    plain = PlainModel(model.info, model.tokenizer, PlainFormat())
    assert prompt(plain, user("Hi")) == "User: Hi\nAssistant:"
    begun = {"role": "assistant", "content": "Once"}
    assert prompt(plain, user("Hi"), begun, continue_final_message=True) == "User: Hi\nAssistant: Once"


def test_a_prompt_is_never_cut(model: PlainModel) -> None:
    with pytest.raises(ContextLengthError):
        prompt(model, user("word " * 2000))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "king", "content": "a"}],
        [{"content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"text": "a"}]}],
        [{"role": "user", "content": "half \ud800"}],
        "hello",
    ],
    ids=str,
)
def test_messages_that_make_no_sense_are_refused(model: PlainModel, messages: Any) -> None:
    with pytest.raises((UsageError, PromptError)):
        ChatJob(ChatBody.parse({"messages": messages}), model)
