"""An answer of a chat as it comes: reasoning and answer told apart, Markdown rendered block by block."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from exl_cli.ui.console import harmless

if TYPE_CHECKING:
    from rich.live import Live

    from exl_cli.structured.reasoning import Piece
    from exl_cli.ui.chat import ChatConsole

# How often a growing Markdown block is shown anew, at most (seconds).
_REFRESH = 0.1


class Answer:
    """Shows an answer as it comes: reasoning dim, or not at all, and then the answer."""

    def __init__(self, console: ChatConsole, *, thinking: bool) -> None:
        self._console = console
        self._thinking = thinking
        self._kind = ""

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._console.end_line()

    def show(self, pieces: Iterable[Piece]) -> None:
        """Show what has come."""
        for piece in pieces:
            # Models begin with a space or a line break that belongs to the turn's header.
            text = piece.text if self._kind == piece.kind else piece.text.lstrip()
            if not text:
                continue
            if self._kind != piece.kind:
                self._change(piece.kind)
            if piece.kind == "answer":
                self._answer(text)
            elif self._thinking:
                self._console.dim_text(text)

    def _change(self, kind: str) -> None:
        if kind == "reasoning" and not self._thinking:
            self._console.note("thinking…")
        if self._kind == "reasoning" and self._thinking:
            self._console.end_line()
            self._console.text("\n")
        self._kind = kind

    def _answer(self, text: str) -> None:
        self._console.text(text)

    def _end(self) -> None:
        """The answer is complete."""


class MarkdownAnswer(Answer):
    """Shows an answer's Markdown: each block is rendered once, when it is finished; the last grows as plain text."""

    def __init__(self, console: ChatConsole, *, thinking: bool) -> None:
        super().__init__(console, thinking=thinking)
        from exl_cli.ui.markdown import BlockSplitter

        self._blocks = BlockSplitter()
        self._live: Live | None = None
        self._next = 0.0
        self._begun = False

    def _answer(self, text: str) -> None:
        finished = self._blocks.push(text)
        live = self._started()
        for block in finished:
            self._render(block)
        if finished or time.monotonic() >= self._next:
            live.update(self._tail(), refresh=True)
            self._next = time.monotonic() + _REFRESH

    def _end(self) -> None:
        if self._live is None:
            return
        # First the growing block goes away, then it comes back rendered.
        self._live.stop()
        self._live = None
        for block in self._blocks.flush():
            self._render(block)

    def _started(self) -> Live:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console.out, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        return self._live

    def _render(self, block: str) -> None:
        from rich.markdown import Markdown

        if self._begun:
            self._console.out.print()
        self._begun = True
        self._console.out.print(Markdown(harmless(block), hyperlinks=False))

    def _tail(self) -> Any:
        """The end of the growing block, as much of it as the screen can take away again."""
        from rich.text import Text

        out = self._console.out
        lines = Text(harmless(self._blocks.pending)).wrap(out, out.width)
        return Text("\n").join(lines[-max(out.height - 2, 1) :])
