"""Sanitize untrusted text for terminals (control sequences, invisible and bidi characters), and word-wrap streams."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata

# Replace control characters, except line feed and tab, by Unicode's control pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)
_MODEL_TEXT = _PICTURES | dict.fromkeys((0x2028, 0x2029), "\n")
# DEL, C1 controls, line separators, and Unicode's Bidi_Control and Default_Ignorable_Code_Point.
_INVISIBLE = re.compile(
    "[\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Bidirectional embeddings, overrides and isolates, and the characters that close them.
_CLOSED_BY = dict.fromkeys("\u202a\u202b\u202d\u202e", "\u202c") | dict.fromkeys("\u2066\u2067\u2068", "\u2069")
_JOINER = "\u200d"


def harmless(text: str, *, terminal: bool = True) -> str:
    """Replace control characters in a name or message; for a terminal, also escape invisible and bidi characters."""
    return (_INVISIBLE.sub(_code_point, text) if terminal else text).translate(_PICTURES)


def _code_point(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def harmless_json(text: str) -> str:
    """Escape the invisible and bidi characters in JSON text, without changing its value."""
    return _INVISIBLE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def harmless_lines(text: str) -> str:
    """Sanitize model text: like `harmless`, but keep joined emoji, and bidi controls closed at the end of a line."""
    return "\n".join(line + closing(line) for line in text.translate(_MODEL_TEXT).split("\n"))


def closing(line: str) -> str:
    """The characters that close a line's open bidi controls."""
    return _closing(_unclosed([], line))


def _unclosed(openers: list[str], text: str) -> list[str]:
    """The bidi controls open after a text, given those open before it."""
    openers = list(openers)
    for char in text:
        if char in _CLOSED_BY:
            openers.append(char)
        elif char == "\u202c" and openers and _CLOSED_BY[openers[-1]] == char:
            openers.pop()
        elif char == "\u2069" and (isolates := [i for i, opener in enumerate(openers) if _CLOSED_BY[opener] == char]):
            del openers[isolates[-1] :]
    return openers


def _closing(openers: list[str]) -> str:
    return "".join(_CLOSED_BY[opener] for opener in reversed(openers))


class Wrapper:
    """Word-wraps streamed text.

    A word is held back until it is known to fit on the line. At the start of a line it is shown as it streams, and the
    terminal breaks a word longer than the line.
    """

    def __init__(self) -> None:
        self.column = 0
        self._held = ""  # blanks and the word after them
        self._last = ""  # last character
        self._shown = ""  # last character shown
        self._flowing = False  # the beginning of the word is already shown
        self._openers: list[str] = []

    def push(self, text: str) -> str:
        """Add text; return what can be shown."""
        width, shown = shutil.get_terminal_size().columns, []
        for char in text.translate(_MODEL_TEXT):
            if char == "\n":
                shown.append(self.end() + "\n")
                self.column = 0
                continue
            if char in " \t" or _may_part(self._last, char):
                shown.append(self._release(width))
                self._flowing = False
            self._held += char
            self._last = char
            if char not in " \t" and (self._flowing or not self.column or self._advance(self._held) > width):
                shown.append(self._release(width))
                self._flowing = True
        return "".join(shown)

    def end(self) -> str:
        """Return the held text, closing open bidi controls."""
        rest = self._release(shutil.get_terminal_size().columns) + _closing(self._openers)
        self._held, self._last, self._flowing, self._openers = "", "", False, []
        return rest

    def _release(self, width: int) -> str:
        """Return the held word, on this line or the next."""
        word, shown = self._held.lstrip(" \t"), ""
        if not word:
            return ""
        if self.column and not self._flowing and self._advance(self._held) > width:
            shown = _closing(self._openers) + "\n" + "".join(self._openers)
            self.column, self._held = 0, word
        held, self._held = self._held, ""
        self._openers = _unclosed(self._openers, held)
        for char in held:
            after, self._shown = self._advance(char), char
            if char == "\t":  # expand it: Rich would compute tab stops from the start of this string
                after = max(min(after, width), self.column)
                char = " " * (after - self.column)
            elif after > width:  # the terminal breaks the line
                after -= self.column
            self.column = after
            shown += char
        return shown

    def _advance(self, text: str) -> int:
        """The column after a text, on an infinitely long line."""
        column, before = self.column, self._shown
        for char in text:
            column += 8 - column % 8 if char == "\t" else _cells(char, before)
            before = char
        return column


def _cells(char: str, before: str = "") -> int:
    """Columns that a character adds; none if it joins the emoji before it."""
    from rich.cells import get_character_cell_size

    if before == _JOINER or (before and "\U0001f3fb" <= char <= "\U0001f3ff"):
        return 0
    return 1 if char == "\ufe0f" else get_character_cell_size(char)


def _may_part(before: str, after: str) -> bool:
    """Whether a line may break between two non-blank characters: next to wide ones (CJK, emoji), but not inside an
    emoji, before closing punctuation, or after opening punctuation."""
    if before in ("", " ", "\t", _JOINER) or 2 not in (_cells(before), _cells(after)):
        return False
    category = unicodedata.category(after)
    joined = category[0] == "M" or after == _JOINER or "\U0001f3fb" <= after <= "\U0001f3ff"
    return not joined and category not in ("Pe", "Pf", "Po") and unicodedata.category(before) not in ("Ps", "Pi")
