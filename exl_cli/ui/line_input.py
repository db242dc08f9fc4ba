"""Lines from a pipe or file, or from a terminal that cannot do more. `terminal` is for one that can."""

from __future__ import annotations

import sys
from collections.abc import Callable

from exl_cli.chat.commands import is_open
from exl_cli.models.prompt import not_utf8
from exl_cli.ui.chat import CONTINUATION, PROMPT


class PlainInput:
    """Reads standard input line by line, a block between quotation marks as one.

    Args:
        ask: shows what stands before a line, where a person types it.
    """

    def __init__(self, ask: Callable[[str], object] = lambda prompt: None) -> None:
        self._ask = ask

    def read(self, draft: str) -> str | None:
        """See `conversation.ReadLine`; there is nobody to show a draft to."""
        text = self._line(PROMPT)
        while text is not None and is_open(text) and (more := self._line(CONTINUATION)) is not None:
            text += "\n" + more
        return text

    def _line(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of input."""
        if sys.stdin is None or sys.stdin.closed:
            return None
        self._ask(prompt)
        buffer = getattr(sys.stdin, "buffer", None)
        data = sys.stdin.readline().encode("utf-8", "replace") if buffer is None else buffer.readline()
        if not data:
            return None
        try:
            return str(data.decode("utf-8-sig")).rstrip("\r\n")
        except UnicodeDecodeError as error:
            hint = "it is left out; convert it with iconv -t UTF-8"
            raise not_utf8("a line on standard input", error.start, data[error.start], hint) from error
