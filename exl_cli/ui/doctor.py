"""How the doctor's checklist is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from exl_cli.doctor.check_result import CheckResult
from exl_cli.ui.console import Console, dim, flags, harmless

_TITLE = 15
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red"), "skip": ("-", "dim")}
_PLAIN = {"✓": "+", "✗": "x", "→": "->"}


def spelled(result: CheckResult) -> CheckResult:
    """With its parameters as flags."""
    return replace(result, message=flags(result.message), fix=flags(result.fix))


class Checklist:
    """Results on stdout, a line each; the fix stands below, unbroken, to be copied."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Any = None

    def waiting_for(self, what: str) -> None:
        """Name on a terminal the check in progress."""
        if self._status is not None:
            self._status.update(dim(f"checking {what}"))

    def show(self, result: CheckResult) -> None:
        """One result."""
        result = spelled(result)
        from rich.text import Text

        mark, style = _MARKS[result.status]
        indent = 2 + _TITLE + 1
        lines = self._wrapped(harmless(result.message), indent)
        head = Text.assemble(
            (self._shown(mark), f"bold {style}" if result.status in ("warn", "fail") else style),
            " ",
            f"{result.check:<{_TITLE}} ",
        )
        for number, line in enumerate(lines):
            text = head if number == 0 else Text(" " * indent)
            text.append(line, "dim" if result.status == "skip" else "")
            self._print(text)
        if result.fix:
            self._print(Text.assemble(" " * indent, self._shown("→") + " ", (harmless(result.fix), "bold")))

    def conclude(self, summary: str) -> None:
        """The verdict."""
        from rich.text import Text

        self._print(Text(""))
        self._print(Text(harmless(flags(summary)), "bold"))

    def _print(self, text: Any) -> None:
        self._console.out.print(text, soft_wrap=True, highlight=False, markup=False)

    def _shown(self, mark: str) -> str:
        """The mark, or what stands for it where it cannot be written."""
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
        """While this lasts, a terminal shows that something is going on."""
        err = self._console.err
        if err.is_terminal and self._console.out.is_terminal:
            # On stdout's console: the results are printed above it.
            self._status = self._console.out.status(dim("checking"), spinner="dots")
        if self._status is None:
            yield
            return
        with self._status:
            yield
