"""Lines from a pipe or file, or from a terminal that cannot do more."""

from __future__ import annotations

import sys

from exl_cli.chat.lines import is_open
from exl_cli.chat.loop import Event, Line, Signal
from exl_cli.errors import PromptError


class PlainSource:
    """Reads standard input line by line, a block between quotation marks as one. See `loop.Source`."""

    def read(self, draft: str) -> Event:
        """See `loop.Source.read`; there is nobody to show a draft to."""
        text = self._line()
        if text is None:
            return Signal.END
        while is_open(text):
            more = self._line()
            if more is None:
                break
            text += "\n" + more
        return Line(text)

    def _line(self) -> str | None:
        """The next line without its end; None at the end of input."""
        if sys.stdin is None or sys.stdin.closed:
            return None
        buffer = getattr(sys.stdin, "buffer", None)
        data = sys.stdin.readline().encode("utf-8", "replace") if buffer is None else buffer.readline()
        if not data:
            return None
        try:
            return str(data.decode("utf-8-sig")).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"a line on standard input is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
                "it is left out; convert it with iconv -t UTF-8",
            ) from error
