"""The manifest of a batch job: everything that determines its answers. Runs that add to one file must have the same."""

from __future__ import annotations

import hashlib
from typing import Any

from exl_cli.batch.prompts import Settings
from exl_cli.errors import DamagedModelError, os_errors
from exl_cli.models.info import ModelInfo
from exl_cli.system.version import installed_version

# Of each weight file this many evenly spread pieces of this many bytes are hashed, instead of tens of GB.
_PIECES, _PIECE = 64, 4096


def manifest(info: ModelInfo, settings: Settings, **more: Any) -> dict[str, Any]:
    """The manifest, JSON-ready.

    Args:
        info: the model.
        settings: the job's settings.
        more: anything else that changes the answers.

    Raises:
        DamagedModelError: the model's files cannot be read.
    """
    return {
        "exl": installed_version(),
        "model": info.name,
        "model_hash": model_hash(info),
        **settings.to_dict(),
        **more,
    }


def model_hash(info: ModelInfo) -> str:
    """Hash a model's JSON and template files and samples of its weights. The hash does not depend on the folder.

    Raises:
        DamagedModelError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    weights = sorted({tensor.file for tensor in info.tensors.values()})
    texts = sorted(file for file in info.path.iterdir() if file.suffix in (".json", ".jinja") and file.is_file())
    with os_errors(str(info.path), "check the folder", DamagedModelError):
        for file in texts:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
        for file in weights:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for piece in range(_PIECES):
                    stream.seek(size * piece // _PIECES)
                    digest.update(stream.read(_PIECE))
    return digest.hexdigest()
