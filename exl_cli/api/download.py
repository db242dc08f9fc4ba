"""Download models from Python, and report progress as plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from exl_cli.api import notebook
from exl_cli.models.hub import names
from exl_cli.models.hub.download import Outcome, Plan, Wanted, already
from exl_cli.models.hub.download import download as download_model
from exl_cli.models.hub.store import staged_bytes
from exl_cli.system.units import Milestones, size


class Lines:
    """Reports a download as plain lines; a `hub.download.Observer`.

    Args:
        note: prints a line.
        clock: current time in seconds.
    """

    def __init__(self, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._note, self._clock = note, clock
        self._plan: Plan | None = None
        self._here = self._done = 0

    def note(self, message: str) -> None:
        self._note(message)

    def begin(self, plan: Plan) -> None:
        self._plan = plan
        self._here = self._done = sum(item.bytes_here for item in plan.items)
        resumed = f", {size(self._here)} already downloaded" if self._here else ""
        self.note(
            f"Downloading {plan.wanted.repository} (commit {plan.listing.commit[:8]}) to {plan.wanted.folder}: "
            f"{len(plan.items)} files, {size(plan.total)}{resumed}"
        )
        self._begun = self._clock()
        self._milestones = Milestones(self._clock, self._here, plan.total)

    def advance(self, name: str, count: int) -> None:
        self._done += count
        self._show(name, count)

    def _show(self, name: str, count: int) -> None:
        done, total = self._done, self._plan.total if self._plan else 0
        if done >= total or not self._milestones.reached(done, total):
            return
        rate = (done - self._here) / max(self._clock() - self._begun, 1e-9)
        left = (total - done) / rate if rate > 0 else 0.0
        self.note(f"{100 * done // total} %: {size(done)} of {size(total)}, {size(rate)}/s, {left:,.0f} s left")

    def end(self) -> None:
        """Remove anything that is not a plain line, such as a progress bar."""

    def stopped(self) -> None:
        """Report how much is kept after Ctrl-C, from the files on disk: the counters may lag behind."""
        self.end()
        if self._plan is None:
            self.note("stopped before anything was downloaded")
            return
        here = sum(item.file.size for item in self._plan.items if item.in_place)
        kept = here + staged_bytes(self._plan.wanted.folder)
        self.note(f"stopped: {size(kept)} of {size(self._plan.total)} kept; run the same command to resume")


def fetch(wanted: Wanted, shown: Lines, token: str | None = None, plan: Plan | None = None) -> Outcome:
    """Download a model unless it is already there.

    Args:
        wanted: the model and its folder.
        shown: receives progress.
        token: see `hub.client.Hub`.
        plan: a plan that has already been made, if any.

    Raises:
        ExlError: see `hub.download.download`.
        KeyboardInterrupt: after a line that says how much is kept.
    """
    if done := already(wanted):  # before importing huggingface_hub
        return done
    from exl_cli.models.hub.client import Hub

    try:
        return download_model(Hub(token, shown.note), wanted, shown, plan)
    except KeyboardInterrupt:
        shown.stopped()
        raise
    finally:
        shown.end()


def download(model_name: str, models_dir: str | Path, revision: str | None, token: str | None, shown: Lines) -> str:
    """See `exl_cli.download`."""
    repository = names.require(model_name, revision)
    wanted = Wanted(repository, Path(models_dir))
    if already(wanted):
        notebook.say(f"{model_name} already exists in the models directory")
    else:
        fetch(wanted, shown, token)
    return f"{str(models_dir).rstrip('/')}/{repository.folder}"
