"""Rendering prompts: variables, plain templates, raw text, chat templates. What is refused: see `test_messages`."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_cli.errors import PromptError, UsageError
from exl_cli.models.chat_template import ChatTemplate, load_chat_template
from exl_cli.models.prompt import Prompt, fill, parse_variables, render_prompt

STEP_BY_STEP = "问题: {question}\n回答: 让我们逐步思考。"
CHAT = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")


@pytest.mark.parametrize(
    ("items", "variables"),
    [
        ([], {}),
        (["a=1"], {"a": "1"}),
        (["a=", "b=x=y=z"], {"a": "", "b": "x=y=z"}),
        (["question=什么是人工智能?"], {"question": "什么是人工智能?"}),
        (["问题=1\n2"], {"问题": "1\n2"}),
        (["a= spaces stay "], {"a": " spaces stay "}),
    ],
)
def test_variables_are_read(items, variables):
    assert parse_variables(items) == variables


@pytest.mark.parametrize(
    ("template", "variables", "text"),
    [
        ("", {}, ""),
        ("plain", {}, "plain"),
        ("{a}{b}{a}", {"a": "1", "b": "2"}, "121"),
        ("{{a}} {{{a}}} }}{{", {"a": "x"}, "{a} {x} }{"),
        (STEP_BY_STEP, {"question": "什么是{人工智能}?"}, "问题: 什么是{人工智能}?\n回答: 让我们逐步思考。"),
        ('{{"json": "{value}"}}', {"value": "{}"}, '{"json": "{}"}'),
        ("{问题}", {"问题": "q"}, "q"),
        ("{__class__}", {"__class__": "only a name"}, "only a name"),
    ],
)
def test_a_template_is_filled(template, variables, text):
    assert fill(template, variables) == text


@given(st.text(), st.text())
def test_braces_and_values_pass_unchanged(literal, value):
    escaped = literal.replace("{", "{{").replace("}", "}}")
    assert fill(escaped, {}) == literal
    assert fill(f"{escaped}{{a}}{escaped}", {"a": value}) == literal + value + literal


@given(st.text(alphabet="{}a.[]!:0 "))
def test_any_template_is_filled_or_refused(template):
    with contextlib.suppress(PromptError):
        fill(template, {"a": "x"})


def test_a_prompt_goes_through_the_chat_template():
    assert render_prompt("hi", chat=CHAT) == Prompt("[user]hi", add_special_tokens=False, kind="chat")
    assert render_prompt("hi", system="be brief", chat=CHAT).text == "[system]be brief[user]hi"
    assert render_prompt("hi", system="", chat=CHAT).text == "[system][user]hi"


def test_the_built_in_model_writes_its_turns(exl2_dir):
    prompt = render_prompt("Tell me a fable.", system="Be brief.", chat=load_chat_template(exl2_dir))
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTell me a fable.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not prompt.add_special_tokens


def test_raw_text_and_text_for_a_model_without_chat_template_stay_as_they_are():
    expected = Prompt(" hi {x}\n", add_special_tokens=True, kind="raw")
    assert render_prompt(" hi {x}\n", raw=True, chat=CHAT) == expected
    assert render_prompt(" hi {x}\n") == expected


def test_a_plain_template_is_sent_verbatim():
    prompt = render_prompt(None, template=STEP_BY_STEP, variables={"question": "1+1?"}, chat=CHAT)
    assert prompt.text == "问题: 1+1?\n回答: 让我们逐步思考。"
    assert prompt.variables == {"question": "1+1?"}
    assert prompt.kind == "template"
    assert prompt.add_special_tokens


def test_a_prompt_fills_the_place_that_a_template_names():
    prompt = render_prompt("hi", template="Q: {prompt} ({lang})", variables={"lang": "en"})
    assert prompt.text == "Q: hi (en)"
    assert prompt.variables == {"lang": "en", "prompt": "hi"}


def test_a_system_message_needs_a_chat_template():
    with pytest.raises(UsageError, match="needs a model with a chat template"):
        render_prompt("x", system="s")
    with pytest.raises(PromptError, match="the prompt is empty"):
        render_prompt(" \n", chat=CHAT)


def test_jinja_stays_out_of_this_process():
    code = "import sys; from exl_cli.models.chat_template import ChatTemplate as T; T('x').render([{}])"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('jinja2' in sys.modules)"], check=True)
