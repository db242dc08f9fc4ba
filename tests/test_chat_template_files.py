"""Finding a model's chat template and special tokens."""

from __future__ import annotations

import json
import re

import pytest

from exl_cli.errors import DamagedModelError, PromptError
from exl_cli.models.chat_template import load_chat_template
from exl_cli.ui.console import flags

TURN = [{"role": "user", "content": "a"}]


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


JINJA = {"chat_template.jinja": "jinja"}
MORE = {"additional_chat_templates__rag.jinja": "rag", "additional_chat_templates__tool_use.jinja": "tool use"}
LEGACY = {"chat_template.json": {"chat_template": "legacy"}}
CONFIG = {"tokenizer_config.json": {"chat_template": "config"}}
NAMED = [{"name": "default", "template": "first"}, {"name": "rag", "template": "second"}]
NAMED_CONFIG = {"tokenizer_config.json": {"chat_template": NAMED}}


@pytest.mark.parametrize(
    ("files", "name", "text", "origin"),
    [
        (JINJA | LEGACY | CONFIG, None, "jinja", "chat_template.jinja"),
        (LEGACY | CONFIG, None, "legacy", "chat_template.json"),
        (CONFIG, None, "config", "tokenizer_config.json"),
        (CONFIG, "default", "config", "tokenizer_config.json"),
        (NAMED_CONFIG, None, "first", "tokenizer_config.json"),
        (NAMED_CONFIG, "rag", "second", "tokenizer_config.json"),
        (JINJA | MORE | NAMED_CONFIG, None, "jinja", "chat_template.jinja"),
        (JINJA | MORE | NAMED_CONFIG, "tool_use", "tool use", "additional_chat_templates/tool_use.jinja"),
    ],
)
def test_templates_are_found_where_transformers_looks(tmp_path, files, name, text, origin):
    template = load_chat_template(write(tmp_path, **files), name)
    assert (template.source, template.origin, template.variant) == (text, origin, name or "default")


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": {"chat_template": None}}])
def test_a_model_may_have_no_template(tmp_path, files):
    assert load_chat_template(write(tmp_path, **files)) is None
    with pytest.raises(PromptError, match="no chat template"):
        load_chat_template(tmp_path, "rag")


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (NAMED_CONFIG, "nope", "the model has no chat template named 'nope'; it has: default, rag"),
        (
            MORE,
            None,
            "the model has several chat templates and none of them is the default: rag, tool_use; "
            "choose one with exl run --chat-template NAME",
        ),
        (JINJA, "rag", "the model has no chat template named 'rag'; it has: default"),
    ],
)
def test_the_names_are_listed_when_the_wanted_one_is_missing(tmp_path, files, name, message):
    with pytest.raises(PromptError) as caught:
        load_chat_template(write(tmp_path, **files), name)
    assert flags(f"{caught.value.message}; {caught.value.hint}") == message


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": "{"},
        {"tokenizer_config.json": "[]"},
        {"tokenizer_config.json": "[" * 100_000},
        {"tokenizer_config.json": {"chat_template": 5}},
        {"tokenizer_config.json": {"chat_template": []}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default"}]}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": 5}]}},
    ],
)
def test_damaged_files_are_named(tmp_path, files):
    with pytest.raises(DamagedModelError, match=re.escape("tokenizer_config.json")):
        load_chat_template(write(tmp_path, **files))


def test_text_that_is_not_utf8_is_damage(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedModelError, match=r"cannot read chat_template\.jinja"):
        load_chat_template(tmp_path)


TOKEN_OBJECT = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TOKEN_FILES = {
    "strings": ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}, None),
    "objects": ({"bos_token": TOKEN_OBJECT | {"__type": "AddedToken"}, "eos_token": "</s>"}, None),
    "a map wins beside an old configuration": ({"bos_token": "<old>", "unk_token": "<u>"}, {"bos_token": TOKEN_OBJECT}),
    "a map beside a new one does not": ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<map>"}),
    "a token of the model's own": ({"bos_token": "<s>", "image_token": "<img>"}, None),
    "tokens by name": ({"extra_special_tokens": {"boi_token": "<boi>", "eoi_token": "<eoi>"}}, None),
    "none": ({}, None),
}
SHOW_TOKENS = "{% for t in [bos_token, eos_token, unk_token, pad_token, image_token, boi_token] %}{{ t }},{% endfor %}"


@pytest.mark.parametrize(("config", "tokens"), TOKEN_FILES.values(), ids=TOKEN_FILES)
def test_special_tokens_are_those_of_transformers(tmp_path, config, tokens):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", "<u>", "<old>", "<map>", "<img>", "<boi>", "<eoi>"]
    Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, "<u>")).save(
        str(tmp_path / "tokenizer.json")
    )
    write(tmp_path, **{"tokenizer_config.json": {"chat_template": SHOW_TOKENS, **config}})
    if tokens is not None:
        write(tmp_path, **{"special_tokens_map.json": tokens})
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    want = judge.apply_chat_template(TURN, tokenize=False)
    assert load_chat_template(tmp_path).render(TURN) == want
