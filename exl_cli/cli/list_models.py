"""`exl list`: the models on this machine."""

from __future__ import annotations

from exl_cli.cli.options import Json, ModelsDir
from exl_cli.models import folders
from exl_cli.ui import models
from exl_cli.ui.console import Console


def list_models(models_dir: ModelsDir = None, as_json: Json = False) -> None:
    """List the models on this machine, the built-in one included."""
    console = Console()
    entries = folders.entries(models_dir)
    if as_json:
        console.data([entry.to_dict() for entry in entries])
    else:
        models.show_models(console, entries)
