"""`exl rm`: remove a downloaded model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from exl_cli.cli.options import ModelsDir, Quiet
from exl_cli.errors import UsageError
from exl_cli.models import folders
from exl_cli.system import units
from exl_cli.ui import models
from exl_cli.ui.console import Console


def remove(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A downloaded owner/name[:revision], or its folder in the models folder.",
            autocompletion=folders.complete_model,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
) -> None:
    """Remove a model from the models folder; of a link, the link alone. Nothing outside that folder is touched."""
    console = Console(quiet=quiet)
    path = folders.find_to_remove(model, models_dir)
    if path.is_symlink():
        what = f"the link {path} (the model that it leads to stays)"
    else:
        what = f"{path} ({units.size(folders.folder_bytes(path))})"
    if not yes:
        if not (sys.stdin.isatty() and console.err.is_terminal):
            raise UsageError("exl rm asks first, and no one is there to answer", "say --yes")
        if not models.confirm(console, f"Remove {what}?", default=False):
            console.note("nothing removed")
            return
    folders.remove(path)
    console.note(f"removed {what}")
