"""Downloading as commands do it: the Hub and the console brought together."""

from __future__ import annotations

import sys
from pathlib import Path

from exl_cli import loader
from exl_cli.errors import ModelNotFoundError
from exl_cli.models import folders
from exl_cli.models.hub import names
from exl_cli.models.hub.plan import Outcome, Plan, Wanted, already
from exl_cli.models.info import ModelInfo
from exl_cli.system import units
from exl_cli.ui import models as console_models
from exl_cli.ui import transfers
from exl_cli.ui.console import Console


def fetch(wanted: Wanted, console: Console, token: str | None = None, plan: Plan | None = None) -> Outcome:
    """Have a model here, and show how that goes.

    Args:
        wanted: what, and where to.
        console: where to show it.
        token: see `hub.client.Hub`.
        plan: where one has been made.

    Raises:
        ExlError: see `hub.download.download`.
        KeyboardInterrupt: Ctrl-C, after a line that says what is kept.
    """
    if done := already(wanted):  # before anything that talks to the Hub is imported
        return done
    from exl_cli.models.hub.client import Hub
    from exl_cli.models.hub.download import download

    with transfers.transfers(console) as shown:
        try:
            return download(Hub(token, shown.note), wanted, shown, plan)
        except KeyboardInterrupt:
            shown.stopped()
            raise


def ensure(model: str | None, models: Path | None, *, allow: bool, console: Console) -> ModelInfo:
    """The model, downloaded first if it is a repository's and not here.

    Args:
        model, models: see `loader.resolve`.
        allow: download without asking; else a person at a terminal is asked, and nothing is fetched for anyone else.
        console: where to ask and to show progress.

    Raises:
        ModelNotFoundError: it is not here, and no one said yes.
        ExlError: see `fetch`.
    """
    try:
        return loader.resolve(model, models)
    except ModelNotFoundError:
        repository = names.parse(model or "")
        if repository is None or not (allow or (sys.stdin.isatty() and console.err.is_terminal)):
            raise
        wanted = Wanted(repository, folders.models_dir(models))
        plan = None
        if not allow:
            from exl_cli.models.hub.client import Hub
            from exl_cli.models.hub.plan import prepare

            plan = prepare(Hub(note=console.note), wanted, console.note)
            question = f"{repository} is not here. Download {units.size(plan.remaining)} to {wanted.folder}?"
            if not console_models.confirm(console, question):
                raise
    transfers.finished(console, fetch(wanted, console, plan=plan))
    return loader.resolve(model, models)
