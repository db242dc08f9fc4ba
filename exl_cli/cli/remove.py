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
            help="Downloaded owner/name[:revision], or its folder in the models folder.",
            autocompletion=folders.complete_model,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
) -> None:
    """Remove a downloaded model.

    Nothing outside the models folder is touched. If the entry is a symbolic link, only the link is removed.
    """
    console = Console(quiet=quiet)
    path = folders.find_to_remove(model, models_dir)
    if path.is_symlink():
        what = f"the link {path} (keeping the model it points to)"
    else:
        what = f"{path} ({units.size(folders.folder_bytes(path))})"
    if not yes:
        if not (sys.stdin.isatty() and console.err.is_terminal):
            raise UsageError("cannot ask for confirmation without a terminal", "add --yes")
        if not models.confirm(console, f"Remove {what}?", default=False):
            console.note("nothing removed")
            return
    folders.remove(path)
    console.note(f"removed {what}")
