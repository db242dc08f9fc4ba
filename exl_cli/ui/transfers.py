"""How a download is shown: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exl_cli.api.download import Lines
from exl_cli.system.units import size
from exl_cli.ui.console import Console, harmless

if TYPE_CHECKING:
    from exl_cli.models.hub.download import Outcome, Plan


def observer(console: Console) -> Lines:
    """Shows a download to whoever reads stderr."""
    return Bars(console) if console.is_live else Lines(console.note)


class Bars(Lines):
    """A bar for the whole download and one for each file under way."""

    def __init__(self, console: Console) -> None:
        super().__init__(console.note)
        self._console = console
        self._bars: Any = None

    def begin(self, plan: Plan) -> None:
        """See `Observer.begin`."""
        super().begin(plan)
        self._bars = _bars(self._console)
        self._total = self._bars.add_task("total", total=plan.total, completed=self._here)
        self._tasks: dict[str, Any] = {}
        self._files = {item.file.name: (item.bytes_here, item.file.size) for item in plan.items}
        self._bars.start()

    def _show(self, name: str, count: int) -> None:
        here, whole = self._files[name]
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(harmless(name), total=whole, completed=here)
        self._files[name] = here + count, whole
        self._bars.update(self._total, completed=self._done)
        self._bars.update(self._tasks[name], completed=here + count, visible=here + count < whole)

    def end(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


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
