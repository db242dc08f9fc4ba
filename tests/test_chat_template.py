"""Published chat templates, compared with transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from exl_cli.errors import PromptError
from exl_cli.models.chat_template import ChatTemplate, load_chat_template
from exl_cli.models.template_helper import Helper
from exl_cli.ui.console import flags

DATA = Path(__file__).parent / "data"
TEMPLATES = sorted(path.stem for path in (DATA / "chat_templates").glob("*.jinja"))
HELPER = Helper()
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ODD = "Grüße, 世界! 🦙 <|im_end|> {{ bos_token }} {% if %} <b>&amp;\"'</b>\n\n  spaced \t"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The <weather> in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
            "required": ["city"],
        },
    },
}


def turns(*texts, system=None):
    conversation = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return conversation if system is None else [{"role": "system", "content": system}, *conversation]


CONVERSATIONS = {
    "one": turns("Hi"),
    "system": turns(ODD, system="Be brief."),
    "odd": turns("a", ODD, "b", system=ODD),
    "many": turns(*(f"turn {i}" for i in range(9))),
    "answered": turns("a", "<think>\nhm\n</think>\n\nb", "c", "d"),
    "reasoned": [*turns("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}, *turns("c")],
    "twice": [*turns("a"), *turns("b")],
    "blocks": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}],
    "unknown role": [{"role": "narrator", "content": "x"}],
    "empty": turns(""),
    "none": [{"role": "user", "content": "x", "tool_calls": None}],
    "tools": [
        *turns("weather?"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "abc123456", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "abc123456", "name": "weather", "content": "sunny"},
        *turns("thanks"),
    ],
}


@cache
def source(name):
    return (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def judged(text, conversation, *, tools=None, add_generation_prompt=False, continue_final_message=False, **extra):
    """What transformers makes of it; an exception where it raises one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{key: value for key, value in turn.items() if value is not None} for turn in conversation]
    try:
        (rendered,), _ = render_jinja_template(
            [conversation],
            tools=tools,
            chat_template=text,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **TOKENS | extra,
        )
    except Exception as error:
        return error
    return rendered


def rendered(text, conversation, **options):
    try:
        return ChatTemplate(text, special_tokens=TOKENS, helper=HELPER).render(conversation, **options)
    except PromptError as error:
        return error


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_render_as_in_transformers(name, conversation):
    text = source(name)
    for answer in (True, False):
        for extra in ({}, {"tools": [TOOL]}, {"enable_thinking": False, "bos_token": "<other>"}):
            want = judged(text, conversation, add_generation_prompt=answer, **extra)
            got = rendered(text, conversation, add_generation_prompt=answer, extra=extra)
            if isinstance(want, Exception):
                assert isinstance(got, PromptError)
                assert str(want).split("(")[0].strip()[:60] in got.message
            else:
                assert got == want


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_turn_is_continued_as_in_transformers(name):
    for conversation in (turns("a", "Once upon a time "), turns("a", " there was ", system="s"), turns("a", "x" * 99)):
        want = judged(source(name), conversation, continue_final_message=True)
        got = rendered(source(name), conversation, continue_final=True)
        assert isinstance(got, PromptError) if isinstance(want, Exception) else got == want


def test_a_block_of_the_last_turn_is_continued():
    conversation = [*turns("a"), {"role": "assistant", "content": [{"type": "text", "text": "Once "}]}]
    want = judged(source("gemma-3"), conversation, continue_final_message=True)
    assert want.endswith("Once")
    assert rendered(source("gemma-3"), conversation, continue_final=True) == want
    assert conversation[1]["content"] == [{"type": "text", "text": "Once "}]


@pytest.mark.parametrize(
    ("text", "conversation", "message"),
    [
        ("{{ messages[0].content }}", [{"role": "assistant"}], "the last message has no text to continue"),
        (
            "{{ messages[0].content }}",
            [{"role": "assistant", "content": []}],
            "the last message has no text to continue",
        ),
        ("{{ messages[0].role }} content", turns("a"), "drops the message to continue"),
    ],
)
def test_what_cannot_be_continued(text, conversation, message):
    error = rendered(text, conversation, continue_final=True)
    assert message in error.message
    assert error.hint


def test_a_long_conversation_is_no_attack():
    text = "word über\n" * 5_000
    conversation = turns(*([text] * 199))
    for name in ("chatml", "gpt-oss"):
        assert rendered(source(name), conversation) == judged(source(name), conversation, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "conversation", "message", "hint"),
    [
        ("gemma-2", turns("a", system="s"), "rejects this conversation: System role not supported", "drop --system"),
        ("mistral-0.2", turns("a", system="s"), "rejects this conversation: Conversation roles must", "drop --system"),
        ("gemma-2", CONVERSATIONS["twice"], "rejects this conversation: Conversation roles must", "alternate user"),
        ("llama-3.1", CONVERSATIONS["twice"][:0], "no message to send", "pass a prompt"),
    ],
)
def test_a_refusal_quotes_the_template(name, conversation, message, hint):
    error = rendered(source(name), conversation)
    assert message in error.message
    assert hint in flags(error.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\n{% if %}",
            "is broken: Expected an expression, got 'end of statement block' (chat_template.jinja, line 2)",
        ),
        ("\n\n{{ x|nonsense }}", "is broken: No filter named 'nonsense'. (chat_template.jinja, line 3)"),
        ("{% for m in messages %}", "is broken: Unexpected end of template."),
        ("\n{{ messages[0].x.y }}", "failed: 'dict object' has no attribute 'x' (chat_template.jinja, line 2)"),
        ("{{ 'a' + 1 }}", 'failed: can only concatenate str (not "int") to str (chat_template.jinja, line 1)'),
        ("\n{{ ''.__class__ }}", "was stopped: it accesses '__class__' of a str (chat_template.jinja, line 2)"),
        ("{{ raise_exception('\x1b[2J\r\nnasty' + 'x' * 999) }}", "rejects this conversation: [2J nastyxxxxx"),
    ],
)
def test_a_broken_template_is_placed(text, message):
    error = rendered(text, turns("a"))
    assert message in error.message
    assert error.hint
    assert error.message.isprintable()
    assert len(error.message) < 400


def test_the_built_in_model_renders_as_in_transformers(exl2_dir):
    from transformers import PreTrainedTokenizerFast

    judge, template = PreTrainedTokenizerFast.from_pretrained(exl2_dir), load_chat_template(exl2_dir)
    for name in ("one", "system", "odd", "many", "answered", "empty"):
        conversation = CONVERSATIONS[name]
        for answer in (True, False):
            want = judge.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer)
            assert template.render(conversation, add_generation_prompt=answer) == want
