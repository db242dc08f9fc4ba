"""Stream a chat's answer to the terminal: dim reasoning, Markdown rendered block by block."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from exl_cli.ui.text import closing, harmless_lines

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions
    from rich.live import Live
    from rich.segment import Segment

    from exl_cli.structured.reasoning import Piece
    from exl_cli.ui.chat import ChatConsole

# Minimum seconds between redraws of an unfinished Markdown block.
_REFRESH = 0.1
# Blocks that an empty line ends. Lists and quotations may continue after one.
_ENDED_BY_EMPTY_LINE = ("paragraph_open", "heading_open", "hr", "table_open")


class Answer:
    """Streams plain text; reasoning is dim or hidden."""

    def __init__(self, console: ChatConsole, *, thinking: bool) -> None:
        self._console = console
        self._thinking = thinking
        self._kind = ""

    def show(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            # Models often begin with white space that belongs to the turn's header.
            text = piece.text if self._kind == piece.kind else piece.text.lstrip()
            if not text:
                continue
            if self._kind != piece.kind:
                self._change(piece.kind)
            if piece.kind == "answer":
                self._answer(text)
            elif self._thinking:
                self._console.stream(text, "dim")

    def end(self) -> None:
        """Show whatever is still held back."""

    def _change(self, kind: str) -> None:
        if kind == "reasoning" and not self._thinking:
            self._console.note("thinking…")
        if self._kind == "reasoning" and self._thinking:
            self._console.end_text()
            self._console.stream("\n")
        self._kind = kind

    def _answer(self, text: str) -> None:
        self._console.stream(text)


class MarkdownAnswer(Answer):
    """Renders each Markdown block once it is complete; the unfinished last block is shown as plain text."""

    def __init__(self, console: ChatConsole, *, thinking: bool) -> None:
        super().__init__(console, thinking=thinking)
        self._blocks = BlockSplitter()
        self._live: Live | None = None
        self._next = 0.0
        self._begun = False

    def end(self) -> None:
        """Replace the last block's plain text by its rendering."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._render(self._blocks.flush())

    def _answer(self, text: str) -> None:
        from rich.live import Live

        finished = self._blocks.push(text)
        if self._live is None:
            self._live = Live(console=self._console.out, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        self._render(finished)
        if finished or time.monotonic() >= self._next:
            self._live.update(self._tail(), refresh=True)
            self._next = time.monotonic() + _REFRESH

    def _render(self, blocks: list[str]) -> None:
        from rich.markdown import Markdown

        for block in blocks:
            if self._begun:
                self._console.out.print()
            self._begun = True
            self._console.out.print(_Closed(Markdown(harmless_lines(block), hyperlinks=False)))

    def _tail(self) -> Any:
        """The last lines of the unfinished block, no more than fit on the screen, where Live can erase them."""
        from rich.text import Text

        out = self._console.out
        lines = Text(harmless_lines(self._blocks.pending)).wrap(out, out.width)
        return Text("\n").join(Text(harmless_lines(line.plain)) for line in lines[-max(out.height - 2, 1) :])


class _Closed:
    """A Rich renderable that closes open bidirectional controls at the end of each line."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for line in console.render_lines(self._content, options, pad=False):
            yield from [*line, Segment(closing("".join(part.text for part in line)) + "\n")]


class BlockSplitter:
    """Splits streamed Markdown (CommonMark with tables) into top-level blocks, once later text cannot change them.

    Parses only text not emitted yet, and only at line ends.
    """

    def __init__(self) -> None:
        from markdown_it import MarkdownIt

        self._parser = MarkdownIt("commonmark").enable("table")
        self.pending = ""

    def push(self, text: str) -> list[str]:
        """Add text; return the blocks that it completes."""
        self.pending += text
        if "\n" not in text:
            return []
        whole, newline, rest = self.pending.rpartition("\n")
        blocks, left = self._cut(whole + newline, final=False)
        self.pending = left + rest
        return blocks

    def flush(self) -> list[str]:
        """Return the remaining blocks."""
        text, self.pending = self.pending, ""
        return self._cut(text, final=True)[0]

    def _cut(self, text: str, *, final: bool) -> tuple[list[str], str]:
        """Split a text into complete blocks and the rest; if `final`, all blocks are complete."""
        lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
        tokens = [token for token in self._parser.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
        blocks = [(token.type, token.markup, token.map[0], token.map[1]) for token in tokens if token.map]
        if blocks and not final and not _is_finished(*blocks[-1], lines):
            blocks.pop()
        edges = [0, *(end for _, _, _, end in blocks)]
        if final:
            edges.append(len(lines))
        given = ["".join(lines[start:end]) for start, end in itertools.pairwise(edges)]
        return [block for block in given if block.strip()], "".join(lines[edges[-1] :])


def _is_finished(kind: str, markup: str, start: int, end: int, lines: list[str]) -> bool:
    """Whether later text cannot change the last block."""
    if kind == "fence":
        closing = lines[end - 1].strip()
        return end - 1 > start and closing.startswith(markup) and not closing.strip(markup[0])
    return kind in _ENDED_BY_EMPTY_LINE and any(not line.strip() for line in lines[end:])
