"""Token ids of a growing conversation start with the computed ones and always decode to the text."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exl_cli.chat.prompt_encoder import Encoded, PromptEncoder
from exl_cli.models.chat_template import PlainFormat
from exl_cli.models.tokenizer import Tokenizer


def sentencepiece(folder: Path, normalizer: dict[str, object], pre_tokenizer: dict[str, object] | None) -> Path:
    """A tokenizer as Llama 2 and Mistral have it: words begin with ▁, the first one too; the rest is bytes."""
    pieces = ["▁", "▁the", "▁a", "▁fox", "▁User", "▁Assistant", ":", ".", "User", "Assistant", "fox", "the", "\n"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("ABCDEFGHIJKLMNOPQRSTUVWXYZ<>/|_!?,'")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocab = [[token, -5.0 - (0.01 * i if i < 3 else 0)] for i, token in enumerate(dict.fromkeys(tokens))]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **special} for i in range(3)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(value))
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    return folder


LLAMA = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}  # fmt: skip
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.fixture(scope="module", params=["bytes", "llama", "metaspace"])
def folder(request: pytest.FixtureRequest, exl2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizers")
    if request.param == "llama":
        return sentencepiece(place / "llama", LLAMA, None)
    return sentencepiece(place / "metaspace", SPACES, METASPACE) if request.param == "metaspace" else exl2_dir


@functools.cache
def read(folder: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return Tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text one character at a time, as no tokenizer writes it but a model may."""
    # Behind something that joins with no character, so that no space is put before it.
    before = "<|im_end|>" if tokenizer.token_id("<|im_end|>") is not None else ":"
    start = len(tokenizer.encode(before, add_special_tokens=False))
    return [id_ for char in text for id_ in tokenizer.encode(before + char, add_special_tokens=False)[start:]]


_words = st.text(st.sampled_from("abz .:\nUé🦊"), max_size=12)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=st.lists(st.tuples(_words, _words), min_size=1, max_size=4), system=_words, chat=st.booleans())
def test_ids_decode_to_the_text_and_start_with_the_computed_ones(
    folder: Path, talk: list[tuple[str, str]], system: str, chat: bool
) -> None:
    tokenizer, backend = read(folder)
    encoder = PromptEncoder(tokenizer, add_special_tokens=not chat)
    end = "<|im_end|>" if "fable" in folder.name else "</s>"
    text = f"{system}{end}\n" if chat else ""
    messages: list[dict[str, str]] = []
    for said, answer in talk:
        if chat:
            text += f"[{said}]"
        else:
            messages.append({"role": "user", "content": said})
            text = PlainFormat().render(messages)
        prompt = encoder.encode(text)
        direct = tokenizer.encode(text, add_special_tokens=not chat)
        assert backend.decode(list(prompt.ids), skip_special_tokens=False) == backend.decode(
            direct, skip_special_tokens=False
        )
        generated = spelled(tokenizer, answer)
        encoder.computed(prompt, [*generated, *tokenizer.eos_ids], answer)
        known = encoder.known
        assert known.ids[: len(prompt.ids)] == prompt.ids
        assert known.text == text + answer[: len(known.text) - len(text)]
        if chat:
            text += answer
            # An end-of-sequence token follows: there is always a boundary, and everything is used again.
            following = encoder.encode(text + end)
            assert following.ids[: len(known.ids)] == known.ids
            text += end
        else:
            messages.append({"role": "assistant", "content": answer})


@pytest.fixture
def fable(exl2_dir: Path) -> tuple[PromptEncoder, Tokenizer]:
    tokenizer = Tokenizer(exl2_dir)
    return PromptEncoder(tokenizer, add_special_tokens=False), tokenizer


def said(encoder: PromptEncoder, prompt: str, answer: str, ids: list[int]) -> Encoded:
    encoded = encoder.encode(prompt)
    encoder.computed(encoded, ids, answer)
    return encoded


def test_a_diverging_text_reuses_the_common_prefix(
    fable: tuple[PromptEncoder, Tokenizer],
) -> None:
    encoder, tokenizer = fable
    first = said(encoder, "<|im_start|>one<|im_end|>\n", "a fox", spelled(tokenizer, "a fox"))
    known = encoder.known
    second = said(encoder, "<|im_start|>one<|im_end|>\na fox<|im_end|>\n<|im_start|>two", "x", spelled(tokenizer, "x"))
    assert second.ids[: len(known.ids)] == known.ids
    other = encoder.encode("<|im_start|>one<|im_end|>\na fox<|im_end|>\n<|im_start|>three")
    assert other.ids[: len(known.ids)] == known.ids
    assert encoder.encode("<|im_start|>one<|im_end|>\na cat").ids[: len(first.ids)] == first.ids
    # Going on with an answer uses its very tokens.
    assert encoder.encode("<|im_start|>one<|im_end|>\na fox<|im_end|>\n<|im_start|>twox").ids == encoder.known.ids
    text = "<|im_start|>new"
    assert list(encoder.encode(text).ids) == tokenizer.encode(text, add_special_tokens=False)


def test_a_token_that_runs_across_the_end_of_the_old_text_loses_nothing(
    fable: tuple[PromptEncoder, Tokenizer],
) -> None:
    encoder, tokenizer = fable
    said(encoder, "<|im_start|>", "the fo", tokenizer.encode("the fo", add_special_tokens=False))
    text = "<|im_start|>the fox and the hen"
    assert list(encoder.encode(text).ids) == tokenizer.encode(text, add_special_tokens=False)


def test_half_a_character_at_the_end_is_not_taken_for_known(fable: tuple[PromptEncoder, Tokenizer]) -> None:
    encoder, tokenizer = fable
    ids = tokenizer.encode("a🦊", add_special_tokens=False)
    prompt = said(encoder, "<|im_start|>", "a", ids[:-1])
    assert encoder.known.text == "<|im_start|>a"
    assert len(encoder.known.ids) == len(prompt.ids) + 1


def test_tokens_that_do_not_show_in_the_text_are_not_taken_for_known(fable: tuple[PromptEncoder, Tokenizer]) -> None:
    encoder, tokenizer = fable
    ids = [*spelled(tokenizer, "ab"), 1, *spelled(tokenizer, "cd")]
    said(encoder, "<|im_start|>", "abcd", ids)
    assert encoder.known.text == "<|im_start|>ab"


def test_tags_of_reasoning_that_are_special_tokens_are_part_of_the_text(exl2_dir: Path, tmp_path: Path) -> None:
    value = json.loads((exl2_dir / "tokenizer.json").read_text())
    special = {**value["added_tokens"][0], "normalized": False}
    value["added_tokens"] += [
        {**special, "id": 4096 + i, "content": tag} for i, tag in enumerate(("[THINK]", "[/THINK]"))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    tokenizer = Tokenizer(tmp_path)
    encoder = PromptEncoder(tokenizer, add_special_tokens=False)
    assert encoder.tag_ids == {4096: "[THINK]", 4097: "[/THINK]"}
    ids = [4096, *spelled(tokenizer, "hm"), 4097, *spelled(tokenizer, "ok")]
    said(encoder, "<|im_start|>", "[THINK]hm[/THINK]ok", [*ids, 2])
    assert encoder.known.text == "<|im_start|>[THINK]hm[/THINK]ok"
    assert list(encoder.known.ids) == [1, *ids]
