"""Everything a person or a pipe sees. stdout carries model text or the data asked for; all the rest is on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from exl_cli.api import notebook, records
from exl_cli.engines.base import Summary
from exl_cli.errors import ExlError, spell
from exl_cli.system.readings import GpuReading, HostReading
from exl_cli.system.units import MIB, mib

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    from exl_cli.ui.progress import Loading

# Control characters that would act on a terminal, shown as the pictures Unicode has for them. Line feed and tab stay.
_HARMLESS = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}


def harmless(text: str) -> str:
    """Text that cannot move the cursor, recolour, retitle or otherwise command a terminal."""
    return text.translate(_HARMLESS)


def flags(text: str) -> str:
    """Text with its parameters written as flags: `--max-seq-len`."""
    return spell(text, lambda name: "--" + name.replace("_", "-"))


class Console:
    """Where a command writes.

    Args:
        quiet: keep stderr for errors alone.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._at_line_start = True

    @cached_property
    def out(self) -> RichConsole:
        """Rich's console on stdout."""
        return _rich(sys.stdout)

    @cached_property
    def err(self) -> RichConsole:
        """Rich's console on stderr."""
        return _rich(sys.stderr)

    @property
    def is_live(self) -> bool:
        """Whether progress is shown by bars and spinners on stderr rather than by lines."""
        return not self.quiet and self.err.is_terminal

    # --- stdout ---------------------------------------------------------------------------------------------------

    def text(self, text: str) -> None:
        """Model text, as it comes: byte for byte into a pipe or file, harmless on a terminal."""
        if not text:
            return
        if sys.stdout.isatty():
            self.out.out(harmless(text), end="", highlight=False)
            self.out.file.flush()
        else:
            _write(sys.stdout, text)
        self._at_line_start = text.endswith("\n")

    def end_text(self) -> None:
        """Put the cursor of a terminal at the start of a line after model text; a pipe gets nothing added."""
        if not self._at_line_start and sys.stdout.isatty():
            self.out.out("")
        self._at_line_start = True

    def data(self, value: Any) -> None:
        """One JSON value on one line."""
        _write(sys.stdout, flags(json.dumps(value, ensure_ascii=False)) + "\n")

    # --- stderr ---------------------------------------------------------------------------------------------------

    def note(self, message: str) -> None:
        """A dim line on stderr."""
        if not self.quiet:
            self.err.print(harmless(flags(message)), style="dim", markup=False, highlight=False, soft_wrap=True)

    def summary(self, summary: Summary) -> None:
        """The notebook's two lines, and those about speculation where there was some."""
        for line in notebook.timings(summary):
            self.note(line)

    def cut_off(self, summary: Summary, context_length: int, most: int) -> None:
        """What cut a response off, and what to do for more of it; nothing where it came to its own end.

        Args:
            summary: of the response.
            context_length: the context that the model was loaded with, in tokens.
            most: the context that it was made for.
        """
        limit = records.limit(summary, context_length)
        if limit == "max_new_tokens":
            self.note(f"stopped after {summary.new_tokens:,} tokens; raise --max-new-tokens for more")
        elif limit == "context":
            more = f"raise --max-seq-len, up to {most:,}," if context_length < most else "shorten the prompt"
            self.note(
                f"stopped after {summary.new_tokens:,} tokens: the context of {context_length:,} tokens is full; "
                f"{more} for more"
            )

    def memory(self, gpus: Sequence[GpuReading], host: HostReading) -> None:
        """The memory table: one row for each GPU in use, or this process's memory where none is."""
        if self.quiet:
            return
        if gpus:
            self.err.print(_gpu_table(gpus))
        else:
            self.note(f"Memory: {mib(host.resident_bytes)} resident, {mib(host.peak_bytes)} peak")

    def loading(self, model: str) -> Loading:
        """Shows in a `with` block that a model loads."""
        from exl_cli.ui.progress import Loading

        return Loading(self, model)

    def error(self, error: ExlError) -> None:
        """What is wrong and the next step."""
        self._error_lines(flags(error.message), flags(error.hint))

    def bug(self, error: BaseException) -> None:
        """A failure that no one foresaw."""
        text = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        self._error_lines(f"unexpected {what}", "run again with --debug for the traceback, and please report it")

    def traceback(self, error: BaseException) -> None:
        """Where a failure came from, for --debug."""
        import traceback

        self.err.out(harmless("".join(traceback.format_exception(error)).rstrip("\n")), highlight=False)

    def _error_lines(self, message: str, hint: str) -> None:
        from rich.text import Text

        line = Text.assemble(("error: ", "bold red"), harmless(message))
        if hint:
            line.append("; " + harmless(hint), "dim")
        self.err.print(line, highlight=False, soft_wrap=True)


def dim(text: str) -> Text:
    """Text as a spinner shows it."""
    from rich.text import Text

    return Text(harmless(text), "dim")


def _gpu_table(gpus: Sequence[GpuReading]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SQUARE, header_style="dim", style="dim")
    table.add_column("GPU", min_width=13)
    for title in ("Temp", "Power", "Memory MiB\nused / total", "Util", "Process\nMiB", "Peak\nMiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for gpu in gpus:
        table.add_row(
            f"{gpu.device.removeprefix('cuda:')} {gpu.name or 'unknown'}",
            _amount(gpu.temperature, " C"),
            _pair(gpu.power, gpu.power_limit, " W"),
            _pair(gpu.used_bytes, gpu.total_bytes, scale=MIB),
            _amount(gpu.utilisation, " %"),
            _amount(gpu.process_bytes, scale=MIB),
            _amount(gpu.process_peak_bytes, scale=MIB),
        )
    return table


def _amount(value: float | None, unit: str = "", *, scale: int = 1) -> str:
    return "-" if value is None else f"{value / scale:.0f}{unit}"


def _pair(used: float | None, total: float | None, unit: str = "", *, scale: int = 1) -> str:
    if used is None and total is None:
        return "-"
    return f"{_amount(used, scale=scale)} / {_amount(total, scale=scale)}{unit}"


def _rich(file: TextIO) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(file=file)


def _write(stream: TextIO, text: str) -> None:
    """Write at once and as UTF-8, whatever the locale says: a pipe carries bytes, not a terminal's encoding."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(text)
    else:
        buffer.write(text.encode("utf-8"))
    stream.flush()


def abandon_stdout() -> None:
    """Write nothing more to a closed pipe: the interpreter then ends without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
