"""Parsing a chat's text: reasoning, Markdown blocks, quoted blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_cli.chat.commands import is_open, unquote
from exl_cli.structured.reasoning import TAGS, Splitter, split
from exl_cli.ui.chat import BlockSplitter


@pytest.mark.parametrize(("opening", "closing"), TAGS.items())
def test_all_kinds_of_reasoning_are_separated_from_the_answer(opening: str, closing: str) -> None:
    assert split(f"{opening}\nhm{closing}\n\nFour.") == ("\nhm", "Four.")
    # A template may have opened it.
    assert split(f"hm{closing}Four.", f"<|assistant|>{opening}\n") == ("hm", "Four.")


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("Four.", "", "Four."),
        ("In HTML, <think> is no tag. </think>", "", "In HTML, <think> is no tag. </think>"),
        ("<think>never closed", "never closed", ""),
        ("<think></think>Four.", "", "Four."),
        ("\n <think>a</think>b</think>c", "a", "b</think>c"),
        ("<thin", "", "<thin"),
        ("<think>a</thin", "a</thin", ""),
        ("  two spaces", "", "  two spaces"),
        ("", "", ""),
    ],
)
def test_what_counts_as_reasoning(text: str, reasoning: str, answer: str) -> None:
    assert split(text) == (reasoning, answer)


_pieces = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "think>", "</", "a b", "\n", " ", "[THINK]", "[/THINK]"])
)


@given(pieces=_pieces, prompt=st.sampled_from(["", "<think>\n"]), cuts=st.lists(st.integers(0, 60)))
def test_chunking_makes_no_difference(pieces: list[str], prompt: str, cuts: list[int]) -> None:
    text = "".join(pieces)
    splitter = Splitter(prompt)
    found = []
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        found += splitter.push(text[start:end])
    found += splitter.flush()
    both = tuple("".join(p.text for p in found if p.kind == kind) for kind in ("reasoning", "answer"))
    assert both == split(text, prompt)


BLOCKS = [
    "# Title",
    "A paragraph\nof two lines.",
    "- one\n- two\n\n  still two",
    "1. first",
    '```python\nprint("a")\n\n# not a heading\n```',
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "> quoted",
    "Setext\n======",
    "last",
]
MARKDOWN = "\n\n".join(BLOCKS[:-1]) + "\nlast"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_each_block_is_emitted_once_and_complete(size: int) -> None:
    splitter = BlockSplitter()
    blocks = []
    for start in range(0, len(MARKDOWN), size):
        blocks += splitter.push(MARKDOWN[start : start + size])
    assert [block.strip("\n") for block in blocks + splitter.flush()] == BLOCKS


def test_a_block_is_emitted_as_soon_as_it_is_complete() -> None:
    splitter = BlockSplitter()
    assert splitter.push("A line\n") == []
    assert splitter.push("\n") == ["A line\n"]
    assert splitter.push("```\ncode\n") == []
    assert splitter.push("```\n") == ["\n```\ncode\n```\n"]
    # A list may go on after an empty line.
    assert splitter.push("- a\n\n") == []
    assert [block.strip() for block in splitter.push("b\n\n")] == ["- a", "b"]


@given(st.lists(st.sampled_from(["a", "\n", "\n\n", "# ", "- ", "```", "> ", "  ", "|", "---", "\u2028", "\r\n", "*"])))
def test_no_text_is_lost(parts: list[str]) -> None:
    splitter = BlockSplitter()
    blocks = [block for part in parts for block in splitter.push(part)] + splitter.flush()
    assert "".join("".join(blocks).split()) == "".join("".join(parts).split())


@pytest.mark.parametrize(
    ("text", "opened", "message"),
    [
        ("plain  ", False, "plain"),
        ('"""', True, ""),
        ('"""a', True, "a"),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n\nb\n"""', False, "a\n\nb"),
        ('"""a"""b', True, 'a"""b'),
        ('say """', False, 'say """'),
    ],
)
def test_blocks_between_quotation_marks(text: str, opened: bool, message: str) -> None:
    assert (is_open(text), unquote(text)) == (opened, message)


def test_a_command_may_be_given_a_block() -> None:
    assert is_open('/system """\nBe')
    assert not is_open('/system """\nBe\nkind."""')
