"""What is seen of a chat: answers as they come, the line of numbers after each, and what commands show.

Answers go to stdout, all the rest to stderr. What a command was asked for is shown even where `quiet` keeps notes away.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exl_cli.console import Console, accepted, harmless
from exl_cli.engines.base import Engine, Summary
from exl_cli.session import Session, Turn, excerpt
from exl_cli.stats import GpuReading, HostReading

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from exl_cli.chat.commands import Command
    from exl_cli.chat.partner import Model
    from exl_cli.chat.reasoning import Piece
    from exl_cli.chat.store import Overview

# How often a growing Markdown block is shown anew, at most (seconds).
_REFRESH = 0.1


class ChatConsole(Console):
    """See `console.Console`."""

    # --- answers --------------------------------------------------------------------------------------------------

    def answering(self, *, thinking: bool, markdown: bool) -> Answer:
        """A context to show one answer in."""
        kind = MarkdownAnswer if markdown and sys.stdout.isatty() else Answer
        return kind(self, thinking=thinking)

    def dim_text(self, text: str) -> None:
        """Model text that is not the answer: dim on a terminal, like any other in a pipe."""
        if sys.stdout.isatty() and text:
            self.out.out(harmless(text), end="", highlight=False, style="dim")
            self.out.file.flush()
            self._at_line_start = text.endswith("\n")
        else:
            self.text(text)

    def end_line(self) -> None:
        """End a line of stdout that was begun, also in a pipe: the next answer is not to stick to this one."""
        if not self._at_line_start:
            self.text("\n")

    def turn(self, summary: Summary, context_length: int, *, answered: bool) -> None:
        """The line after an answer."""
        used = summary.prompt_tokens + summary.new_tokens
        parts = [
            f"prompt {summary.prompt_tokens:,} tokens ({summary.reused_tokens:,} reused)",
            f"{summary.new_tokens:,} new, {summary.generation_rate:.1f} tokens/s",
            f"context {used:,}/{context_length:,}",
        ]
        if summary.drafted_tokens:
            parts.insert(2, accepted(summary.accepted_tokens, summary.drafted_tokens))
        if not answered:
            parts = ["stopped before the answer began: the message is not part of the conversation"]
        elif summary.finish_reason == "cancelled":
            parts.append("stopped: /continue")
        elif summary.finish_reason == "length":
            parts.append("the context is full" if used >= context_length else "cut off: /continue")
        elif summary.new_tokens <= 1:
            parts.append("an empty answer: /retry")
        self.note(" · ".join(parts))
        if summary.note:
            self.note(f"note: {summary.note}")

    def dropped(self, turns: Sequence[Turn], tokens: int) -> None:
        """What the model no longer sees."""
        first = [turn for turn in turns if turn.role == "user"]
        what = f"the oldest {len(first)} exchanges" if len(first) > 1 else "the oldest exchange"
        quoted = f"“{excerpt(first[0].content)}”" if first else ""
        if len(first) > 1:
            quoted += f" to “{excerpt(first[-1].content)}”"
        self.note(f"the context is nearly full: dropped {what} ({quoted}), {tokens:,} tokens; the session keeps them")

    # --- what commands show ---------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        """The outcome of a command."""
        self.err.print(harmless(message), style="dim", markup=False, highlight=False, soft_wrap=True)

    def block(self, text: str) -> None:
        """A text as it is."""
        self.err.out(harmless(text), highlight=False)

    def commands(self, commands: Iterable[Command]) -> None:
        """What commands there are."""
        table = _plain_table()
        for command in commands:
            also = f" (also {', '.join('/' + name for name in command.aliases)})" if command.aliases else ""
            table.add_row(f"/{command.name} {command.arguments}".rstrip(), command.help + also)
        self.err.print(table, markup=False, highlight=False)
        self.say('Anything else is a message. """ begins and ends one of several lines; Alt-Enter breaks a line.')

    def settings(self, values: Mapping[str, Any]) -> None:
        """Settings and their values."""
        table = _plain_table()
        for name, value in values.items():
            table.add_row(name, _shown(value))
        self.err.print(table, markup=False, highlight=False)

    def changes(self, changed: Mapping[str, tuple[Any, Any]], unchanged: str) -> None:
        """Settings with their old and new values; `unchanged` names what stayed where nothing else changed."""
        for name, (old, new) in changed.items():
            self.say(f"{name}: {_shown(old)} → {_shown(new)}")
        if not changed:
            self.say(f"{unchanged} is as it was")

    def model(self, model: Model, engine: Engine) -> None:
        """A loaded model."""
        info = model.info
        facts = {
            "model": f"{info.name} ({info.format_name}, {info.architecture}, {_weights(info.parameters)} weights)",
            "engine": f"{engine.name} ({', '.join(f'{name} {value}' for name, value in engine.facts.items())})",
            "context": f"{engine.context_length:,} tokens of the model's {info.context_length:,}",
            "format": model.format.name,
        }
        self.settings(facts)

    def totals(self, session: Session) -> None:
        """What a conversation took."""
        totals = session.totals
        evaluated = totals.prompt_tokens - totals.reused_tokens
        share = totals.reused_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
        facts = {
            "turns": f"{len(session.turns)}, of which the model sees {len(session.turns) - session.dropped}",
            "answers": f"{totals.answers}, retried and stopped ones included",
            "prompts": f"{totals.prompt_tokens:,} tokens, {totals.reused_tokens:,} of them reused ({share:.0%})",
            "evaluated": _timed(evaluated, totals.prompt_seconds),
            "generated": _timed(totals.new_tokens, totals.generation_seconds),
        }
        if totals.drafted_tokens:
            facts["speculation"] = accepted(totals.accepted_tokens, totals.drafted_tokens)
        self.settings(facts)

    def memory_now(self, gpus: Sequence[GpuReading], host: HostReading) -> None:
        """The memory table, asked for."""
        Console().memory(gpus, host)

    def sessions(self, overviews: Iterable[Overview], current: str) -> None:
        """The saved sessions."""
        table = _plain_table(("session", "last change", "turns", "model", "begins"))
        for one in overviews:
            name = f"{one.name} *" if one.name == current else one.name
            when = f"{one.updated:%Y-%m-%d %H:%M}"
            if one.session is None:
                table.add_row(name, when, "-", "-", harmless(one.problem))
            else:
                found = one.session
                table.add_row(name, when, str(len(found.turns)), harmless(found.model), harmless(found.title))
        self.err.print(table, markup=False, highlight=False)

    def resumed(self, session: Session) -> None:
        """Where a saved conversation stands."""
        last = f": “{excerpt(session.turns[-1].content, 100)}”" if session.turns else ""
        self.note(f"going on with {session.name}, {len(session.turns)} turns{last}")

    def copy(self, text: str) -> bool:
        """Put a text into the clipboard of the terminal that stderr is (OSC 52); whether it is one."""
        if not sys.stderr.isatty():
            return False
        encoded = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
        sys.stderr.write(f"\x1b]52;c;{encoded}\x07")
        sys.stderr.flush()
        return True


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
        from exl_cli.chat.markdown import BlockSplitter

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


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(repr(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else harmless(str(value))


def _timed(tokens: int, seconds: float) -> str:
    rate = f" ({tokens / seconds:,.1f} tokens/s)" if seconds > 0 else ""
    return f"{tokens:,} tokens in {seconds:.2f} s{rate}"


def _weights(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _plain_table(headers: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(headers), header_style="dim")
    for header in headers or ("", ""):
        table.add_column(header, overflow="fold")
    return table
