"""All output. stdout carries model text or requested data; everything else goes to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from exl_cli.api import notebook, records
from exl_cli.engines.base import Summary
from exl_cli.errors import ExlError, first_line, spell
from exl_cli.sampling import FIELDS
from exl_cli.system.interrupts import insist_on_interrupt, unseen_keys
from exl_cli.system.readings import GpuReading, HostReading
from exl_cli.system.units import MIB, mib
from exl_cli.ui.text import Wrapper, harmless, harmless_json

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    from exl_cli.ui.progress import Loading


def flags(text: str) -> str:
    """Replace `param` marks by flags: `--max-seq-len`."""
    return spell(text, lambda name: FIELDS[name].flag if name in FIELDS else "--" + name.replace("_", "-"))


_GPU_TITLES = ("GPU", "Temp", "Power", "Memory MiB\nused / total", "Util", "Process\nMiB", "Peak\nMiB")
# Table width in a pipe, where lines must not wrap.
_WIDEST = 100_000
# Width of a column beside another that would be broken otherwise.
_NARROW = 8


class Console:
    """A command's output.

    Args:
        quiet: write only errors to stderr.

    Attributes:
        leaves_on_interrupt: while a model loads, Ctrl-C exits at once instead of raising KeyboardInterrupt.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.leaves_on_interrupt = False
        self._wrapper = Wrapper()
        self._style: str | None = None
        self._at_line_start = True

    @cached_property
    def out(self) -> RichConsole:
        return _rich(sys.stdout)

    @cached_property
    def err(self) -> RichConsole:
        return _rich(sys.stderr)

    @property
    def is_live(self) -> bool:
        """Whether progress is shown as bars and spinners on stderr instead of lines."""
        return not self.quiet and self.err.is_terminal

    # --- stdout ---------------------------------------------------------------------------------------------------

    def text(self, text: str, *, is_json: bool = False) -> None:
        """Write requested text: unchanged to a pipe or file, sanitized on a terminal."""
        terminal = sys.stdout.isatty()
        if terminal and not is_json:
            self._show(harmless(text))
        elif text:
            _write(sys.stdout, harmless_json(text) if terminal else text)
            self._at_line_start = text.endswith("\n")

    def data(self, value: Any) -> None:
        """Write a JSON value on one line."""
        self.text(flags(json.dumps(value, ensure_ascii=False)) + "\n", is_json=True)

    @contextmanager
    def streaming(self) -> Iterator[Callable[[str], None]]:
        """Stream model text, with terminal echo off; ends the last line on leaving."""
        with unseen_keys():
            try:
                yield self.stream
            except BaseException:
                self.end_text(failed=True)
                raise
            self.end_text()

    def stream(self, text: str, style: str | None = None) -> None:
        """Write streamed model text: unchanged to a pipe or file; sanitized and word-wrapped on a terminal."""
        if not sys.stdout.isatty():
            self.text(text)
            return
        self._style = style
        self._show(self._wrapper.push(text), style)

    def end_text(self, *, failed: bool = False) -> None:
        """End the current line on a terminal.

        A pipe or file gets nothing added, unless stderr is the same file and more output follows.
        """
        if sys.stdout.isatty():
            self._show(self._wrapper.end(), self._style)
            if not self._at_line_start:
                self._show("\n")
            self._wrapper.column = 0
        elif (failed or not self.quiet) and not self._at_line_start and _same_file(sys.stdout, sys.stderr):
            _write(sys.stderr, "\n")
        self._at_line_start = True

    def _show(self, text: str, style: str | None = None) -> None:
        if text:
            self.out.out(text, end="", highlight=False, style=style)
            self.out.file.flush()
            self._at_line_start = text.endswith("\n")

    def table(
        self,
        to: RichConsole,
        titles: Sequence[str],
        rows: Iterable[Iterable[object]],
        *,
        right: Sequence[str] = (),
        whole: Sequence[str] = (),
        optional: Sequence[str] = (),
        **layout: Any,
    ) -> None:
        """Print a table, fitted to the terminal's width; in a pipe, lines are as long as needed.

        Cells are sanitized, unless they are Rich's `Text`. There is no header if all titles are empty.

        Args:
            right: titles of right-aligned columns, whose cells are not broken, unless the terminal is too narrow.
            whole: titles of further columns that are not broken.
            optional: titles of columns to leave out, one after the other, until the rest fits.
            layout: overrides options of Rich's `Table`.
        """
        from rich.measure import Measurement
        from rich.text import Text

        cells = [
            [c if isinstance(c, Text) else Text(harmless(str(c), terminal=to.is_terminal)) for c in row] for row in rows
        ]
        columns = [
            _Column(title, list(of), title in right, title in whole) for title, *of in zip(titles, *cells, strict=True)
        ]
        made = _table(columns, layout)
        if to is not self.err and not to.is_terminal:
            text = io.StringIO()
            _rich(text, _WIDEST).print(made)
            self.text("\n".join(line.rstrip(" ") for line in text.getvalue().split("\n")))
            return
        for title in (*optional, None):
            if Measurement.get(to, to.options.update(width=_WIDEST), made).minimum <= to.width:
                break
            columns = [column for column in columns if column.title != title]
            made = _table(columns, layout, broken=title is None)
        to.print(made)

    # --- stderr ---------------------------------------------------------------------------------------------------

    def line(self, *parts: str | tuple[str, str], to: RichConsole | None = None, end: str = "\n") -> None:
        """Print a line of untrusted text, in parts with optional styles; to stderr by default."""
        from rich.text import Text

        to, line = to or self.err, Text()
        for text, style in ((part, "") if isinstance(part, str) else part for part in parts):
            line.append(harmless(text, terminal=to.is_terminal), style)
        to.print(line, highlight=False, soft_wrap=True, end=end)

    def note(self, message: str) -> None:
        """Print a dim line to stderr, unless quiet."""
        if not self.quiet:
            self.line((flags(message), "dim"))

    def summary(self, summary: Summary) -> None:
        """Print the notebook's lines of timings."""
        for line in notebook.timings(summary):
            self.note(line)

    def cut_off(self, summary: Summary, context_length: int, most: int) -> None:
        """If a limit ended the response, say which one and how to get more; the model allows a context of `most`."""
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
        """Print a table of the GPUs in use, or this process's memory on the CPU."""
        if self.quiet:
            return
        if gpus:
            from rich import box

            styles: dict[str, Any] = {"box": box.SQUARE, "style": "dim", "header_style": "dim"}
            self.table(self.err, _GPU_TITLES, map(_gpu_row, gpus), right=_GPU_TITLES[1:], **styles)
        else:
            self.note(f"Memory: {mib(host.resident_bytes)} resident, {mib(host.peak_bytes)} peak")

    @contextmanager
    def loading(self, model: str) -> Iterator[Loading]:
        """Show progress while a model loads."""
        from exl_cli.ui.progress import Loading

        shown = Loading(self, model)
        with insist_on_interrupt(shown.interrupt), shown:
            yield shown

    def error(self, error: BaseException) -> None:
        """Print an error and its hint on one line; anything but an ExlError is reported as unexpected."""
        if not isinstance(error, ExlError):
            name, line = type(error).__name__, first_line(error)
            what = name if line == name else f"{name}: {line}"
            error = ExlError(f"unexpected {what}", "run again with --debug for the traceback, and please report it")
        what, hint = (flags(text).replace("\n", "␊") for text in (error.message, error.hint))
        self.line(("error: ", "bold red"), what, (hint and f"; {hint}", "dim"))

    def traceback(self, error: BaseException) -> None:
        """Print the traceback, for --debug."""
        import traceback

        self.line("".join(traceback.format_exception(error)).rstrip("\n"))


@dataclass(frozen=True)
class _Column:
    title: str
    cells: Sequence[Text]
    right: bool
    whole: bool

    def width(self) -> int:
        from rich.cells import cell_len

        lines = [line for text in (self.title, *(cell.plain for cell in self.cells)) for line in text.splitlines()]
        return max(map(cell_len, lines), default=0)


def _table(columns: Sequence[_Column], layout: Mapping[str, Any], *, broken: bool = False) -> Table:
    """A table; where whole columns must be `broken`, they get the room that the others leave."""
    from rich import box
    from rich.table import Table

    titled, any_whole = any(column.title for column in columns), any(column.whole for column in columns)
    usual = {"box": box.SIMPLE_HEAD, "pad_edge": False, "header_style": "bold", "show_header": titled}
    made = Table(**{**usual, **layout})
    for column in columns:
        unbroken = (column.right or column.whole) and not broken
        narrow = broken and any_whole and not column.whole
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            overflow="fold",
            width=column.width() if unbroken else None,
            max_width=_NARROW if narrow else None,
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*row)
    return made


def dim(text: str) -> Text:
    """Dim, sanitized text for spinners."""
    from rich.text import Text

    return Text(harmless(text), "dim")


def _gpu_row(gpu: GpuReading) -> tuple[str, ...]:
    return (
        f"{gpu.device.removeprefix('cuda:')} {gpu.name or 'unknown'}",
        _amount(gpu.temperature, " C"),
        _pair(gpu.power, gpu.power_limit, " W"),
        _pair(gpu.used_bytes, gpu.total_bytes, scale=MIB),
        _amount(gpu.utilisation, " %"),
        _amount(gpu.process_bytes, scale=MIB),
        _amount(gpu.process_peak_bytes, scale=MIB),
    )


def _amount(value: float | None, unit: str = "", *, scale: int = 1) -> str:
    return "-" if value is None else f"{value / scale:.0f}{unit}"


def _pair(used: float | None, total: float | None, unit: str = "", *, scale: int = 1) -> str:
    if used is None and total is None:
        return "-"
    return f"{_amount(used, scale=scale)} / {_amount(total, scale=scale)}{unit}"


def _rich(file: TextIO, width: int | None = None) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(file=file, width=width)


def _same_file(stream: TextIO, other: TextIO) -> bool:
    try:
        return os.path.sameopenfile(stream.fileno(), other.fileno())
    except (OSError, ValueError):  # closed, or replaced by an embedder
        return False


def _write(stream: TextIO, text: str) -> None:
    """Write UTF-8 and flush, whatever the locale's encoding."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(text)
    else:
        buffer.write(text.encode("utf-8"))
    stream.flush()


def abandon_stdout() -> None:
    """After a broken pipe, point stdout at /dev/null, so that the flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
