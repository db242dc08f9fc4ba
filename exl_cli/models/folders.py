"""Where models lie: the built-in one inside the package, downloaded ones in the models folder."""

from __future__ import annotations

import os
from pathlib import Path

from exl_cli.models.hub import store
from exl_cli.system.files import user_data

BUILTIN = "fable-7m"
BUILTIN_FOLDER = Path(__file__).parent / "builtin" / BUILTIN


def models_dir(given: Path | None = None) -> Path:
    """The folder of downloaded models: the one given, else `EXL_MODELS_DIR`, else the user's data folder."""
    if given is not None:
        return given
    if env := os.environ.get("EXL_MODELS_DIR"):
        return Path(env)
    return user_data() / "models"


def known_models(models: Path | None = None) -> list[str]:
    """Names of the models that can be given without a path: the built-in one and the downloaded folders."""
    return [BUILTIN, *(path.name for path in model_folders(models) if store.state(path) != "partial")]


def model_folders(models: Path | None = None) -> list[Path]:
    """The folders of models, those half downloaded among them, sorted."""
    folder = models_dir(models)
    if not folder.is_dir():
        return []
    entries = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in entries if (path / "config.json").exists() or (path / store.STAGING).exists())


def complete_model(incomplete: str) -> list[str]:
    """Names for the shell to complete: what was downloaded, as owner/name[:revision], else the folder's own name.

    Some shells take a colon for the end of a word, so that a folder with a revision can be completed by both.
    """
    found = [BUILTIN]
    for path in model_folders():
        marker = store.read_marker(path)
        found += [marker.name] if marker else []
        if store.state(path) != "partial" and (marker is None or ":" in marker.name):
            found.append(path.name)
    return [name for name in found if name.startswith(incomplete)]
