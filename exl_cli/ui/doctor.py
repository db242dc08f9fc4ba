"""Print doctor's checklist."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from exl_cli.doctor.check_result import CheckResult
from exl_cli.ui.console import Console, dim, flags

_TITLE = 15
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "bold yellow"), "fail": ("✗", "bold red"), "skip": ("-", "dim")}
_PLAIN = {"✓": "+", "✗": "x", "→": "->"}


def spelled(result: CheckResult) -> CheckResult:
    """Replace the `param` marks by flags."""
    return replace(result, message=flags(result.message), fix=flags(result.fix))


class Checklist:
    """Prints results to stdout, one per line, with the fix below, unwrapped for copying."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Any = None

    def waiting_for(self, what: str) -> None:
        """Show the check in progress, on a terminal."""
        if self._status is not None:
            self._status.update(dim(f"checking {what}"))

    def show(self, result: CheckResult) -> None:
        result, out = spelled(result), self._console.out
        mark, style = _MARKS[result.status]
        title = f" {result.check:<{_TITLE}} "
        indent = " " * (len(mark) + len(title))
        first: list[str | tuple[str, str]] = [(self._shown(mark), style), title]
        for line in self._wrapped(result.message, len(indent)):
            self._console.line(*first, (line, "dim" if result.status == "skip" else ""), to=out)
            first = [indent]
        if result.fix:
            self._console.line(indent, self._shown("→") + " ", (result.fix, "bold"), to=out)

    def conclude(self, summary: str) -> None:
        self._console.line("\n", (flags(summary), "bold"), to=self._console.out)

    def _shown(self, mark: str) -> str:
        """The mark, or an ASCII substitute if stdout cannot encode it."""
        try:
            mark.encode(self._console.out.encoding)
        except (UnicodeEncodeError, LookupError):
            return _PLAIN.get(mark, mark)
        return mark

    def _wrapped(self, text: str, indent: int) -> list[str]:
        if not self._console.out.is_terminal:
            return [text]
        width = max(30, self._console.out.width - indent)
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Show a spinner, on a terminal."""
        if not (self._console.err.is_terminal and self._console.out.is_terminal):
            yield
            return
        # On stdout's console: the results are printed above it.
        with self._console.out.status(dim("checking"), spinner="dots") as self._status:
            yield
