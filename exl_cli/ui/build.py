"""How a build of exllamav2's extension is shown: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from exl_cli.engines.exllamav2.extension.jobs import Progress
from exl_cli.system.units import Milestones, clock_time
from exl_cli.ui.console import Console, harmless


class Bar:
    """One build's progress.

    Args:
        console: where to.
        clock: seconds, for the time between lines.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._milestones = Milestones(clock)

    def update(self, progress: Progress) -> None:
        """Show how far it is."""
        if self._console.quiet:
            return
        if self._console.err.is_terminal:
            self._draw(progress)
        else:
            self._say(progress)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("Compiling", total=progress.total, ends=None, name="")
            self._bar.start()
        ends = None if progress.left is None else time.monotonic() + progress.left
        self._bar.update(
            self._task, completed=progress.done, total=progress.total, ends=ends, name=harmless(progress.name)
        )

    def _say(self, progress: Progress) -> None:
        if not progress.done or not self._milestones.reached(progress.done, progress.total):
            return
        left = "" if progress.left is None or progress.done >= progress.total else clock_time(progress.left)
        self._console.note(
            f"compiled {progress.done} of {progress.total} files in {clock_time(progress.seconds)}"
            + (f", about {left} left" if left else "")
        )


class Build:
    """Tells how a build is going; see `building.build.Observer`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(console)
        self._last: Progress | None = None

    def note(self, message: str) -> None:
        """See `Observer.note`."""
        self._console.note(message)

    def building(self, progress: Progress) -> None:
        """See `Observer.building`."""
        self._last = progress
        self._bar.update(progress)

    def __enter__(self) -> Build:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.end()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            kept = f"{self._last.done} of {self._last.total} files are kept" if self._last else "nothing was compiled"
            self.note(f"stopped: {kept}; exl build goes on from there")


def _left(task: Any) -> str:
    """What is left of the time that a build was last expected to take: it goes on between two files."""
    if task.finished:
        return "loading it once"
    ends = task.fields["ends"]
    return "" if ends is None else f"about {clock_time(ends - time.monotonic())} left"


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(_left(task), no_wrap=True)

    return Progress(
        TextColumn("{task.description}", markup=False),
        # The bar gives way first when the terminal is narrow.
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(),
        TextColumn("files", markup=False),
        TimeElapsedColumn(),
        Left(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[name]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console.err,
        expand=True,
        transient=True,
    )
