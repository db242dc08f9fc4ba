"""Untrusted text on a terminal: invisible characters, bidi controls, word wrapping."""

from __future__ import annotations

import json
import textwrap
from itertools import pairwise

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from wcwidth import wcswidth

from exl_cli.ui.text import Wrapper, harmless, harmless_json, harmless_lines

# Unicode's own tables, as the regex library has them.
UNSEEN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Bidi_Control}\p{Zl}\p{Zp}\x7f-\x9f]")
# All planes that have more than ideographs.
EVERYTHING = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE1000)]))
CONTROLS = regex.compile(r"[^\P{Cc}\n\t]")


def test_names_show_no_invisible_or_bidi_characters() -> None:
    changed = {*UNSEEN.findall(EVERYTHING), *CONTROLS.findall(EVERYTHING)}
    assert set(EVERYTHING) - set(harmless(EVERYTHING)) == changed
    assert harmless("exe\u202egnp.\u200b \u2066\x9b\x7f\U000e0041") == (
        "exe\\u202egnp.\\u200b \\u2066\\u009b\\u007f\\U000e0041"
    )


def test_json_is_of_the_same_value() -> None:
    text = json.dumps(EVERYTHING, ensure_ascii=False)
    assert json.loads(harmless_json(text)) == EVERYTHING
    assert not UNSEEN.search(harmless_json(text))


RLO, RLI, LRE, PDF, PDI = "\u202e", "\u2067", "\u202a", "\u202c", "\u2069"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a{RLO}b\nc", f"a{RLO}b{PDF}\nc"),
        (f"{RLI}a{RLO}b\nc", f"{RLI}a{RLO}b{PDF}{PDI}\nc"),
        (f"{RLI}a{PDF}\u2029c", f"{RLI}a{PDF}{PDI}\nc"),  # a PDF ends no isolate
        (f"{RLI}{LRE}a{PDI}b\u2028c", f"{RLI}{LRE}a{PDI}b\nc"),  # a PDI ends the embeddings in its isolate too
        (f"{RLI}a{PDI}\n{PDI}b", f"{RLI}a{PDI}\n{PDI}b"),
        ("שלום, عالم‌ها 👩‍👩‍👧 ❤️", "שלום, عالم‌ها 👩‍👩‍👧 ❤️"),
        ("\x1b[31mred\x1b]0;title\x07\x08\x7f\x9b", "␛[31mred␛]0;title␇␈␡\ufffd"),
    ],
)
def test_no_change_of_direction_leaves_its_line(text: str, shown: str) -> None:
    assert harmless_lines(text) == shown
    assert streamed(text, 100, 1) == shown


def streamed(text: str, width: int, size: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        wrapper = Wrapper()
        parts = [wrapper.push(text[start : start + size]) for start in range(0, len(text), size)]
        return "".join(parts) + wrapper.end()


WORDS = st.lists(st.text("abc-,.", min_size=1, max_size=8), min_size=1, max_size=30)


@given(words=WORDS, width=st.integers(8, 40), size=st.integers(1, 9))
def test_lines_break_where_textwrap_breaks_them(words: list[str], width: int, size: int) -> None:
    text = " ".join(words)
    expected = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    assert streamed(text, width, size).split("\n") == expected


GRAPHEMES = [*"aé你。（カ한🎉שع \n", "  ", "e\u0301", "👩\u200d👩\u200d👧\u200d👦", "👍🏽", "❤️", "🇩🇪"]


@given(st.lists(st.sampled_from(GRAPHEMES), max_size=60), st.integers(8, 30), st.integers(1, 7))
def test_no_character_is_lost_or_cut_and_no_line_is_too_wide(parts: list[str], width: int, size: int) -> None:
    text = "".join(parts)
    shown = streamed(text, width, size)
    assert shown.split() == shown.replace("\n", " ").split()
    assert "".join(shown.split()) == "".join(text.split())
    for line in shown.split("\n"):
        pieces = regex.findall(r"\X", line)
        assert all(piece in GRAPHEMES for piece in pieces)
        # A run that has no place to break at is the terminal's to break, and so is one behind a line's indentation.
        column = wcswidth(line) - wcswidth(line.lstrip())
        pieces = regex.findall(r"\X", line.lstrip())
        for before, piece in pairwise(["", *pieces]):
            column += wcswidth(piece)
            if column > width:
                column = wcswidth(piece)
                assert " " not in (before, piece)
                assert not regex.fullmatch(r"\p{Han}{2}", before + piece)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("def f(x):\n    if x: y", "def f(x):\n    if x: y"),
        ("see https://example.com/a/long/path", "see\nhttps://example.com/a/long/path"),
        ("ab\tcd\tef\tgh", "ab      cd\nef      gh"),
        ("你好世界，这是一个句子。", "你好世界，\n这是一个句\n子。"),
        ("12345678901 x", "12345678901\nx"),
        ("ends  \n\nhere ", "ends\n\nhere"),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_where_lines_break(text: str, shown: str, size: int) -> None:
    assert streamed(text, 11, size) == shown


def test_a_word_is_held_back_only_while_it_may_have_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    wrapper = Wrapper()
    assert [wrapper.push(text) for text in ("The", " qui", "ck", " ")] == ["The", "", "", " quick"]
    assert [wrapper.push(text) for text in ("unbeliev", "able", "ly")] == ["", "\nunbelievable", "ly"]
    monkeypatch.setenv("COLUMNS", "10")  # the window has become narrower than what is on the line
    assert wrapper.push(" so ") == "\nso"
    monkeypatch.setenv("COLUMNS", "40")
    assert wrapper.push("what has room on the line ") == " what has room on the line"
    assert (wrapper.push("e"), wrapper.end()) == ("", " e")
