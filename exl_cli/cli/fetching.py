"""A model for a command: downloaded first where a person, or a flag, wants that."""

from __future__ import annotations

import sys
from pathlib import Path

from exl_cli import loader
from exl_cli.api.download import fetch
from exl_cli.errors import ModelNotFoundError
from exl_cli.models import folders
from exl_cli.models.hub import names
from exl_cli.models.hub.download import Wanted, prepare
from exl_cli.models.info import ModelInfo
from exl_cli.system import units
from exl_cli.ui import models as console_models
from exl_cli.ui.console import Console
from exl_cli.ui.progress import finished, transfers


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

            plan = prepare(Hub(note=console.note), wanted, console.note)
            question = f"{repository} is not here. Download {units.size(plan.remaining)} to {wanted.folder}?"
            if not console_models.confirm(console, question):
                raise
    finished(console, fetch(wanted, transfers(console), plan=plan))
    return loader.resolve(model, models)
