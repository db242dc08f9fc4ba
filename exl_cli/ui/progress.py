"""Progress of downloads, builds and model loading: bars and spinners on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from exl_cli.api.download import Lines
from exl_cli.errors import ExitCode
from exl_cli.system.processes import leave
from exl_cli.system.units import Milestones, clock_time, size
from exl_cli.ui.console import Console, dim
from exl_cli.ui.text import harmless

if TYPE_CHECKING:
    from exl_cli.engines.exllamav2.extension.build import Progress as BuildProgress
    from exl_cli.models.hub.download import Outcome, Plan


class Live:
    """Base of progress displays: notes, and bars on a terminal that are erased at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Any = None

    def note(self, message: str) -> None:
        self._console.note(message)

    def _make_bars(self, *columns: Any) -> Any:
        from rich.progress import Progress

        self._bars = Progress(*columns, console=self._console.err, expand=True, transient=True)
        return self._bars

    def _count(self, what: str, done: int, total: int | None, left: object = "", name: str = "") -> None:
        """Show one bar with a count, the time left and the current item."""
        if self._bars is None:
            from rich.progress import MofNCompleteColumn, TimeElapsedColumn

            texts = (text_column(f"{{task.fields[{field}]}}") for field in ("left", "name"))
            counts = MofNCompleteColumn(), TimeElapsedColumn()
            bars = self._make_bars(text_column("{task.description}", ratio=3), bar_column(), *counts, *texts)
            self._task = bars.add_task("", left="", name="")
            bars.start()
        what, name = harmless(what), harmless(name)
        self._bars.update(self._task, description=what, completed=done, total=total, left=left, name=name)

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()


def text_column(template: str, **layout: Any) -> Any:
    """A text column, truncated on narrow terminals."""
    from rich.progress import TextColumn
    from rich.table import Column

    return TextColumn(template, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", **layout))


def bar_column() -> Any:
    """The bar, which shrinks first on narrow terminals."""
    from rich.progress import BarColumn
    from rich.table import Column

    return BarColumn(40, table_column=Column(ratio=1))


class Transfers(Live, Lines):
    """A bar for the whole download, and one for each active file."""

    def __init__(self, console: Console) -> None:
        Live.__init__(self, console)
        Lines.__init__(self, console.note)

    def begin(self, plan: Plan) -> None:
        from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        super().begin(plan)
        numbers = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        bars = self._make_bars(text_column("{task.description}", ratio=2), bar_column(), *numbers)
        self._total = bars.add_task("total", total=plan.total, completed=self._here)
        self._tasks: dict[str, Any] = {}
        self._files = {item.file.name: (item.bytes_here, item.file.size) for item in plan.items}
        bars.start()

    def _show(self, name: str, count: int) -> None:
        here, whole = self._files[name]
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(harmless(name), total=whole, completed=here)
        self._files[name] = here + count, whole
        self._bars.update(self._total, completed=self._done)
        self._bars.update(self._tasks[name], completed=here + count, visible=here + count < whole)


def transfers(console: Console) -> Lines:
    """A display of a download's progress on stderr."""
    return Transfers(console) if console.is_live else Lines(console.note)


def finished(console: Console, outcome: Outcome) -> None:
    """Print how a download ended."""
    name, folder = outcome.wanted.repository, outcome.wanted.folder
    if not outcome.commit:
        console.note(
            f"{name} is already in {folder}, but was not downloaded by exl; check it against the Hub with --verify"
        )
    elif not outcome.fetched_bytes and not outcome.seconds:
        checked = "all hashes match" if outcome.wanted.verify else f"{len(outcome.files)} files, {size(outcome.total)}"
        console.note(f"{name} is already in {folder}: {checked}")
    else:
        rate = outcome.fetched_bytes / max(outcome.seconds, 1e-9)
        console.note(
            f"downloaded {name} to {folder}: {size(outcome.fetched_bytes)} in {outcome.seconds:.1f} s, {size(rate)}/s"
        )


class Build(Live):
    """A build of exllamav2's extension; see `extension.build.Observer`.

    Args:
        console: where to.
        clock: in seconds, for the time between lines.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self._milestones = Milestones(clock)
        self._last: BuildProgress | None = None

    def building(self, progress: BuildProgress) -> None:
        self._last = progress
        if self._console.is_live:
            left: object = "" if progress.left is None else _Countdown(time.monotonic() + progress.left)
            if progress.done >= progress.total:
                left = "testing it"
            self._count("Compiling", progress.done, progress.total, left, progress.name)
        elif progress.done and self._milestones.reached(progress.done, progress.total):
            known = progress.left is not None and progress.done < progress.total
            rest = f", about {clock_time(progress.left or 0.0)} left" if known else ""
            self.note(f"compiled {progress.done} of {progress.total} files in {clock_time(progress.seconds)}{rest}")

    def __enter__(self) -> Build:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            kept = f"{self._last.done} of {self._last.total} files kept" if self._last else "nothing was compiled"
            self.note(f"stopped: {kept}; resume with exl build")


class _Countdown:
    """A countdown that keeps running between updates."""

    def __init__(self, end: float) -> None:
        self._end = end

    def __str__(self) -> str:
        return f"about {clock_time(self._end - time.monotonic())} left"


class Loading(Live):
    """A line, with a spinner on a terminal, while a model loads; a `loader.Observer`.

    Ctrl-C exits at once, or is acknowledged at once.
    """

    def __init__(self, console: Console, model: str) -> None:
        super().__init__(console)
        self._line = f"Loading model: {model}"
        self._status: Any = None
        self._build: Build | None = None
        self._interrupted = False

    def __enter__(self) -> Loading:
        if self._console.is_live:
            self._status = self._console.err.status(dim(self._line), spinner="dots")
            self._status.start()
        else:
            self.note(self._line)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_build()
        if self._status is not None:
            self._status.stop()
            if kind is None:
                self.note(self._line)

    def interrupt(self) -> None:
        """Called by the SIGINT handler. During a build, do not exit: the build reports what it keeps."""
        if self._console.leaves_on_interrupt and (self._interrupted or self._build is None):
            if self._status is not None:
                self._status.stop()
            leave(ExitCode.INTERRUPTED)
        elif not self._interrupted:
            self.note("stopping")
        self._interrupted = True

    def progress(self, done: int, total: int) -> None:
        self._end_build()
        if self._status is not None:
            self._status.update(dim(f"{self._line} {100 * done // max(total, 1)} %"))

    def building(self, progress: BuildProgress) -> None:
        """See `extension.build.Observer`; the bar replaces the spinner."""
        if self._build is None:
            if self._status is not None:
                self._status.stop()
            self._build = Build(self._console)
        self._build.building(progress)

    def _end_build(self) -> None:
        if self._build is not None:
            self._build.end()
            self._build = None
            if self._status is not None:
                self._status.start()
