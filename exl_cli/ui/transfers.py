"""How a download is shown: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from exl_cli.models.hub.store import staged_bytes
from exl_cli.system.units import size
from exl_cli.ui.console import Console, harmless

if TYPE_CHECKING:
    from exl_cli.models.hub.plan import Outcome, Plan

_STEPS = 10
_SOONEST_LINE, _LATEST_LINE = 2.0, 60.0


class Transfers:
    """Tells how a download is going; see `hub.download.Observer`. Live bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._total = self._shown = self._fetched = 0
        self._begun = self._last_line = 0.0

    def note(self, message: str) -> None:
        """See `Observer.note`."""
        self._console.note(message)

    def begin(self, plan: Plan) -> None:
        """See `Observer.begin`."""
        self._sizes = {item.file.name: item.file.size for item in plan.items}
        self._done = {item.file.name: item.bytes_here for item in plan.items}
        self._plan, self._total = plan, plan.total
        self._begun = self._last_line = self._clock()
        here = sum(self._done.values())
        resumed = f", {size(here)} of it are here" if here else ""
        self.note(
            f"Downloading {plan.wanted.repository} (commit {plan.listing.commit[:8]}) to {plan.wanted.folder}: "
            f"{len(plan.items)} files, {size(plan.total)}{resumed}"
        )
        self._shown = _STEPS * here // max(self._total, 1)
        if self._console.quiet or not self._console.err.is_terminal:
            return
        self._bars = _bars(self._console)
        self._tasks[""] = self._bars.add_task("total", total=self._total, completed=here)
        self._bars.start()

    def advance(self, name: str, count: int) -> None:
        """See `Observer.advance`."""
        with self._lock:
            self._done[name] += count
            self._fetched += count
            if self._bars is not None:
                self._draw(name, count)
            else:
                self._say()

    def _draw(self, name: str, count: int) -> None:
        if name not in self._tasks:
            before = self._done[name] - count
            self._tasks[name] = self._bars.add_task(harmless(name), total=self._sizes[name], completed=before)
        self._bars.advance(self._tasks[""], count)
        complete = self._done[name] >= self._sizes[name]
        self._bars.update(self._tasks[name], completed=self._done[name], visible=not complete)

    def _say(self) -> None:
        """A line for every tenth of the whole, but no flood of them, and one a minute at least."""
        done, now = sum(self._done.values()), self._clock()
        step, since = _STEPS * done // max(self._total, 1), now - self._last_line
        if done >= self._total or not (since >= _LATEST_LINE or (step > self._shown and since >= _SOONEST_LINE)):
            return
        self._shown, self._last_line = step, now
        rate = self._fetched / max(now - self._begun, 1e-9)
        left = (self._total - done) / rate if rate > 0 else 0.0
        percent = 100 * done // self._total
        self.note(f"{percent} %: {size(done)} of {size(self._total)}, {size(rate)}/s, {left:,.0f} s left")

    def end(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stopped(self) -> None:
        """Say, after Ctrl-C, what is kept. The disk knows best: the last bytes may not have been told."""
        self.end()
        if self._plan is None:
            self.note("stopped before anything was fetched")
            return
        here = sum(item.file.size for item in self._plan.items if item.state == "here")
        kept = here + staged_bytes(self._plan.wanted.folder)
        self.note(f"stopped: {size(kept)} of {size(self._total)} are kept; the same command goes on from there")


@contextmanager
def transfers(console: Console) -> Iterator[Transfers]:
    """A `Transfers` whose bars are gone when it is left, however that happens."""
    shown = Transfers(console)
    try:
        yield shown
    finally:
        shown.end()


def _bars(console: Console) -> Any:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    name = TextColumn(
        "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=2)
    )
    # The bar gives way first when the terminal is narrow.
    columns = (
        name,
        BarColumn(table_column=Column(ratio=1)),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console.err, expand=True, transient=True)


def finished(console: Console, outcome: Outcome) -> None:
    """One line about how a download ended."""
    name, folder = outcome.wanted.repository, outcome.wanted.folder
    if outcome.by_hand:
        console.note(
            f"{name} is already in {folder}, put there by hand: exl does not know whether it is the Hub's (--verify)"
        )
    elif not outcome.fetched_bytes and not outcome.seconds:
        checked = "every hash agrees" if outcome.wanted.verify else f"{len(outcome.files)} files, {size(outcome.total)}"
        console.note(f"{name} is already in {folder}: {checked}")
    else:
        rate = outcome.fetched_bytes / max(outcome.seconds, 1e-9)
        console.note(f"{name} is in {folder}: {size(outcome.fetched_bytes)} in {outcome.seconds:.1f} s, {size(rate)}/s")
