"""Progress of a batch job: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from exl_cli.errors import brief
from exl_cli.system.units import Milestones, clock_time, counted
from exl_cli.ui.console import Console
from exl_cli.ui.progress import Live, bar_column, text_column

if TYPE_CHECKING:
    from exl_cli.batch.job import Progress
    from exl_cli.batch.scores import Scores


class BatchProgress(Live):
    """See `batch.job.View`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._milestones = Milestones(time.monotonic)

    def __enter__(self) -> BatchProgress:
        return self

    def update(self, progress: Progress) -> None:
        if not self._console.is_live:
            if progress.expected and self._milestones.reached(progress.done, progress.expected):
                self.note(_line(progress))
            return
        if self._bars is None:
            bars = self._make_bars(bar_column(), text_column("{task.description}", ratio=3))
            self._task = bars.add_task("", total=None)
            bars.start()
        self._bars.update(self._task, description=_line(progress), completed=progress.done, total=progress.expected)


def summary(progress: Progress, output: str) -> str:
    """The line at the end of a job."""
    return f"{output}: {_line(progress)}"


def elsewhere(missing: Counter[str], model: str) -> str:
    """The line about models that rows name and that are not here."""
    shown = ", ".join(brief(name, 60) for name, _ in missing.most_common(3))
    more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
    prompts = counted(missing.total(), "prompt")
    return f"using {model} for {prompts} whose model is not installed ({shown}{more})"


def show_scores(console: Console, scores: Scores) -> None:
    """The table of scores on stdout, and what has none."""
    titles = ("Score", "Correct", "Of", "Share", "95 % interval")
    rows = []
    for score in scores.scores:
        low, high = score.interval
        interval = f"{low:.1%} to {high:.1%}"
        rows.append((score.metric, f"{score.right:,}", f"{score.count:,}", f"{score.share:.1%}", interval))
    console.table(console.out, titles, rows, right=titles[1:])
    for count, what in ((scores.failed, "failed lines"), (scores.unscored, "responses without a usable value")):
        if count:
            console.note(f"not scored: {count:,} {what}")


def _line(progress: Progress) -> str:
    of = f" of {progress.expected:,}" if progress.expected else ""
    failed = f", {progress.failed:,} failed" if progress.failed else ""
    before = f" ({progress.before:,} from earlier runs)" if progress.before else ""
    rate = progress.new_tokens / max(progress.seconds, 1e-9)
    tokens = f"{progress.prompt_tokens:,} tokens in, {progress.new_tokens:,} out, {rate:,.0f}/s"
    left = ""
    fresh = progress.done - progress.before
    if progress.expected and fresh and progress.expected > progress.done:
        left = f", about {clock_time((progress.expected - progress.done) * progress.seconds / fresh)} left"
    energy = "" if progress.joules is None else f", {progress.joules / 3600:,.1f} Wh"
    return f"{progress.done:,}{of} prompts{before}{failed}, {tokens}{energy}{left}"
