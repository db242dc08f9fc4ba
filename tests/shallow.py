"""fable-7m with two of its eight layers: it takes a quarter of the time, where a text need not be a story.

In EXL2, and in GPTQ.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

import exl_cli

LAYERS = 2


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="exl-tests-")


def shallow() -> Path:
    """Its folder, which lasts as long as this process."""
    return _shallow(Path(exl_cli.__file__).parent / "models" / "builtin" / "fable-7m")


def shallow_gptq() -> Path:
    return _shallow(Path(__file__).parent / "data" / "fable-7m-gptq")


@functools.cache
def _shallow(whole: Path) -> Path:
    folder = Path(_temporary().name) / whole.name
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if int((re.findall(r"layers\.(\d+)\.", n) or ["0"])[0]) < LAYERS}
    save_file(kept, file, {"format": "pt"})
    return folder
