"""Everything a chat displays: answers, the line of numbers after each, and the output of commands.

Answers go to stdout, everything else to stderr. `quiet` hides notes, but not the output of commands.
"""

from __future__ import annotations

import base64
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from exl_cli.api import records
from exl_cli.api.notebook import accepted
from exl_cli.chat.commands import is_open
from exl_cli.chat.conversation import ReadLine
from exl_cli.chat.session import Session, Turn, excerpt
from exl_cli.engines.base import Summary
from exl_cli.models.prompt import decode
from exl_cli.system.readings import GpuReading, HostReading
from exl_cli.ui.console import Console
from exl_cli.ui.text import closing, harmless_lines

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions
    from rich.live import Live
    from rich.segment import Segment

    from exl_cli.chat.commands import Command
    from exl_cli.chat.model import ChatModel
    from exl_cli.structured.reasoning import Piece

# Prompts of the first line and of continuation lines.
PROMPT = ">>> "
CONTINUATION = "... "

# Minimum seconds between redraws of an unfinished Markdown block.
_REFRESH = 0.1
# Blocks that an empty line ends. Lists and quotations may continue after one.
_ENDED_BY_EMPTY_LINE = ("paragraph_open", "heading_open", "hr", "table_open")


class ChatConsole(Console):
    """A `ChatView` on the terminal or in pipes; see `Console`."""

    # --- answers --------------------------------------------------------------------------------------------------

    @contextmanager
    def answering(self, *, thinking: bool, markdown: bool) -> Iterator[Callable[[Iterable[Piece]], None]]:
        answer = (MarkdownAnswer if markdown and sys.stdout.isatty() else Answer)(self, thinking=thinking)
        with self.streaming():
            try:
                yield answer.show
            finally:
                answer.end()

    def end_text(self, *, failed: bool = False) -> None:
        """End the current line, also in a pipe, where the next answer would otherwise follow on the same line."""
        if not self._at_line_start and not sys.stdout.isatty():
            self.text("\n")
        super().end_text()

    def turn(self, summary: Summary, context_length: int, *, answered: bool) -> None:
        used = summary.prompt_tokens + summary.new_tokens
        parts = [
            f"prompt {summary.prompt_tokens:,} tokens ({summary.reused_tokens:,} reused)",
            f"{summary.new_tokens:,} new, {summary.generation_rate:.1f} tokens/s",
            f"context {used:,}/{context_length:,}",
        ]
        if summary.drafted_tokens:
            parts.insert(2, accepted(summary.accepted_tokens, summary.drafted_tokens))
        if not answered:
            parts = ["stopped before the response began; the message was not sent"]
        elif summary.finish_reason == "cancelled":
            parts.append("stopped: /continue")
        elif summary.finish_reason == "length":
            full = records.limit(summary, context_length) == "context"
            parts.append("context full" if full else "cut off: /continue")
        elif summary.new_tokens <= 1:
            parts.append("empty response: /retry")
        self.note(" · ".join(parts))
        if summary.note:
            self.note(f"note: {summary.note}")

    def dropped(self, turns: Sequence[Turn], tokens: int) -> None:
        first = [turn for turn in turns if turn.role == "user"]
        what = f"the oldest {len(first)} exchanges" if len(first) > 1 else "the oldest exchange"
        quoted = f"“{excerpt(first[0].content)}”" if first else ""
        if len(first) > 1:
            quoted += f" to “{excerpt(first[-1].content)}”"
        self.note(
            f"the context is nearly full: dropped {what} ({quoted}), {tokens:,} tokens, from the prompt; "
            "the session keeps them"
        )

    # --- what commands show ---------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        self.line((message, "dim"))

    def block(self, text: str) -> None:
        self.line(text)

    def commands(self, commands: Iterable[Command]) -> None:
        rows = []
        for command in commands:
            also = f" (also {', '.join('/' + name for name in command.aliases)})" if command.aliases else ""
            rows.append((f"/{command.name} {command.arguments}".rstrip(), command.help + also))
        self._list(rows)
        self.say(
            'Anything else is sent as a message. Put """ around a multi-line message, or press Alt-Enter for a newline.'
        )

    def settings(self, values: Mapping[str, Any]) -> None:
        self._list((name, _shown(value)) for name, value in values.items())

    def changes(self, changed: Mapping[str, tuple[Any, Any]], unchanged: str) -> None:
        for name, (old, new) in changed.items():
            self.say(f"{name}: {_shown(old)} → {_shown(new)}")
        if not changed:
            self.say(f"{unchanged} is unchanged")

    def model(self, model: ChatModel) -> None:
        info, engine = model.info, model.engine
        facts = {
            "model": f"{info.name} ({info.format_name}, {info.architecture}, {_weights(info.parameters)} parameters)",
            "engine": f"{engine.name} ({', '.join(f'{name} {value}' for name, value in engine.facts.items())})",
            "context": f"{engine.context_length:,} of the model's {info.context_length:,} tokens",
            "format": model.format.name,
        }
        self.settings(facts)

    def stats(self, session: Session, gpus: Sequence[GpuReading], host: HostReading) -> None:
        totals = session.totals
        evaluated = totals.prompt_tokens - totals.reused_tokens
        share = totals.reused_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
        facts = {
            "turns": f"{len(session.turns)}, {len(session.turns) - session.dropped} of them in the context",
            "responses": f"{totals.answers}, including retried and stopped ones",
            "prompts": f"{totals.prompt_tokens:,} tokens, {totals.reused_tokens:,} of them reused ({share:.0%})",
            "evaluated": _timed(evaluated, totals.prompt_seconds),
            "generated": _timed(totals.new_tokens, totals.generation_seconds),
        }
        if totals.drafted_tokens:
            facts["speculation"] = accepted(totals.accepted_tokens, totals.drafted_tokens)
        self.settings(facts)
        Console().memory(gpus, host)  # it was asked for, quiet or not

    def sessions(self, overviews: Iterable[tuple[str, datetime, Session | str]], current: str) -> None:
        rows = []
        for name, updated, session in overviews:
            shown, when = f"{name} *" if name == current else name, f"{updated:%Y-%m-%d %H:%M}"
            if isinstance(session, str):
                rows.append((shown, when, "-", "-", session))
            else:
                rows.append((shown, when, str(len(session.turns)), session.model, session.title))
        self._list(rows, ("session", "last changed", "turns", "model", "first message"))

    def _list(self, rows: Iterable[Iterable[object]], titles: Sequence[str] = ("", "")) -> None:
        self.table(self.err, titles, rows, box=None, padding=(0, 2, 0, 0), pad_edge=True, header_style="dim")

    def resumed(self, session: Session) -> None:
        last = f": “{excerpt(session.turns[-1].content, 100)}”" if session.turns else ""
        self.note(f"resuming {session.name}, {len(session.turns)} turns{last}")

    def message(self, text: str) -> None:
        self.block(PROMPT + text.replace("\n", "\n" + CONTINUATION))

    def copy(self, text: str) -> bool:
        """Copy text to the clipboard through the terminal on stderr (OSC 52); returns whether there is one."""
        if not sys.stderr.isatty() or self.err.is_dumb_terminal:
            return False
        encoded = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
        sys.stderr.write(f"\x1b]52;c;{encoded}\x07")
        sys.stderr.flush()
        return True


def plain_reader(*, prompts: bool) -> ReadLine:
    """A reader for pipes and files, or, with `prompts`, for terminals without line editing."""

    def read(draft: str) -> str | None:
        text = _line(PROMPT if prompts else "")
        while text is not None and is_open(text):
            if (more := _line(CONTINUATION if prompts else "")) is None:
                break
            text += "\n" + more
        return text

    return read


def _line(prompt: str) -> str | None:
    """The next line of standard input without its end; None at the end of input."""
    if sys.stdin is None or sys.stdin.closed:
        return None
    if prompt:
        sys.stderr.write(prompt)
        sys.stderr.flush()
    buffer = getattr(sys.stdin, "buffer", None)
    data = sys.stdin.readline().encode("utf-8", "replace") if buffer is None else buffer.readline()
    if not data:
        return None
    hint = "the line was skipped; convert the input with iconv -t UTF-8"
    return decode(data, "a line on standard input", hint).rstrip("\r\n")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(repr(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _timed(tokens: int, seconds: float) -> str:
    rate = f" ({tokens / seconds:,.1f} tokens/s)" if seconds > 0 else ""
    return f"{tokens:,} tokens in {seconds:.2f} s{rate}"


def _weights(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


# --- answers ----------------------------------------------------------------------------------------------------------


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
            self._live.update(self._unfinished(), refresh=True)
            self._next = time.monotonic() + _REFRESH

    def _render(self, blocks: list[str]) -> None:
        from rich.markdown import Markdown

        for block in blocks:
            if self._begun:
                self._console.out.print()
            self._begun = True
            self._console.out.print(_Closed(Markdown(harmless_lines(block), hyperlinks=False)))

    def _unfinished(self) -> _Closed:
        """The last lines of the unfinished block, no more than fit on the screen, where Live can erase them."""
        from rich.text import Text

        return _Closed(Text(harmless_lines(self._blocks.pending)), max(self._console.out.height - 2, 1))


class _Closed:
    """A Rich renderable, or the last lines of it, that closes open bidirectional controls at the end of each line."""

    def __init__(self, content: Any, last: int = 0) -> None:
        self._content, self._last = content, last

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for line in console.render_lines(self._content, options, pad=False)[-self._last :]:
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
