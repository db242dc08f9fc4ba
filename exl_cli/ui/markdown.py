"""Cutting a stream of Markdown into its blocks, each given out once, when nothing that follows can change it."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.token import Token

# Blocks that an empty line ends for good. A list or a quotation may go on after one.
_ENDED_BY_EMPTY_LINE = ("paragraph_open", "heading_open", "hr", "table_open")


class BlockSplitter:
    """Collects text and gives out whole top-level blocks (CommonMark with tables).

    Only what has not been given out is parsed, and only when a line ends.
    """

    def __init__(self) -> None:
        self._parser = MarkdownIt("commonmark").enable("table")
        self.pending = ""

    def push(self, text: str) -> list[str]:
        """The blocks that this text completes."""
        self.pending += text
        if "\n" not in text:
            return []
        whole, newline, rest = self.pending.rpartition("\n")
        blocks, left = self._cut(whole + newline, final=False)
        self.pending = left + rest
        return blocks

    def flush(self) -> list[str]:
        """The rest."""
        text, self.pending = self.pending, ""
        return self._cut(text, final=True)[0]

    def _cut(self, text: str, *, final: bool) -> tuple[list[str], str]:
        """The finished blocks of a text, all of them where it is `final`, and what is left of it."""
        lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
        blocks = [token for token in self._parser.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
        if blocks and not final and not _is_finished(blocks[-1], lines):
            blocks.pop()
        given, start = [], 0
        for block in blocks:
            end = block.map[1] if block.map else start
            given.append("".join(lines[start:end]))
            start = end
        left = "".join(lines[start:])
        if final and left.strip():
            given.append(left)
        return [block for block in given if block.strip()], left


def _is_finished(block: Token, lines: list[str]) -> bool:
    """Whether the last block of the text can still change."""
    _, end = block.map or [0, 0]
    if block.type == "fence":
        closing = lines[end - 1].strip()
        start = block.map[0] if block.map else 0
        return end - 1 > start and closing.startswith(block.markup) and not closing.strip(block.markup[0])
    return block.type in _ENDED_BY_EMPTY_LINE and any(not line.strip() for line in lines[end:])
