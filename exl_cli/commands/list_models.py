"""`exl list`: the models that are here."""

from __future__ import annotations

from exl_cli import console_models, inventory
from exl_cli.console import Console
from exl_cli.options import Json, ModelsDir


def list_models(models_dir: ModelsDir = None, as_json: Json = False) -> None:
    """Show the models that are here, the built-in one included."""
    console = Console()
    found = inventory.entries(models_dir)
    if as_json:
        console.data([entry.to_dict() for entry in found])
    else:
        console_models.show(console, console_models.models_table(found))
