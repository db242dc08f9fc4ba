"""Everything a chat displays: answers, the line of numbers after each, and the output of commands.

Answers go to stdout, everything else to stderr. `quiet` hides notes, but not the output of commands.
"""

from __future__ import annotations

import base64
import sys
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
from exl_cli.ui.answers import Answer, MarkdownAnswer
from exl_cli.ui.console import Console

if TYPE_CHECKING:
    from exl_cli.chat.commands import Command
    from exl_cli.chat.model import ChatModel
    from exl_cli.structured.reasoning import Piece

# Prompts of the first line and of continuation lines.
PROMPT = ">>> "
CONTINUATION = "... "


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
            "model": f"{info.name} ({info.format_name}, {info.architecture}, {_weights(info.parameters)} weights)",
            "engine": f"{engine.name} ({', '.join(f'{name} {value}' for name, value in engine.facts.items())})",
            "context": f"{engine.context_length:,} tokens of the model's {info.context_length:,}",
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
        self._list(rows, ("session", "last change", "turns", "model", "begins"))

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
