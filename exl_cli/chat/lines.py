"""How a message of several lines is written: between two times three quotation marks."""

from __future__ import annotations

import re

_QUOTES = '"""'
# A block may also be what a command is given: /system """…
_OPENING = re.compile(r'\s*(?:/[a-z]+\s+)?"""')


def is_open(text: str) -> bool:
    """Whether a block has been opened and not closed, so that the next line belongs to it."""
    opening = _OPENING.match(text)
    return opening is not None and not text[opening.end() :].rstrip().endswith(_QUOTES)


def unquote(text: str) -> str:
    """The text of a block, without the marks and the line breaks next to them; any other text as it is, but for
    white space at its end."""
    text = text.rstrip()
    begun = text.lstrip()
    if not begun.startswith(_QUOTES):
        return text
    inner = begun[len(_QUOTES) :].removesuffix(_QUOTES)
    return inner.removeprefix("\n").removesuffix("\n")
