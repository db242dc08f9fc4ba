"""GPU options with the CPU engine are noted and ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinymodels
from helpers import Recorder

from exl_cli import loader
from exl_cli.errors import spell
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        (LoadOptions(engine="cpu"), []),
        (LoadOptions(engine="cpu", cache="q4"), ["cache: ignored on the CPU"]),
        (
            LoadOptions(engine="cpu", cache="q8", gpu_split=(20.0,), low_mem=True),
            ["cache, gpu_split, low_mem: ignored on the CPU"],
        ),
    ],
)
def test_gpu_options_without_effect_are_noted(tmp_path: Path, options: LoadOptions, notes: list[str]) -> None:
    tinymodels.write(tmp_path / "model", tinymodels.Variant("float"))
    info, recorder = loader.resolve(str(tmp_path / "model")), Recorder()
    loader.load(info, Tokenizer(info.path), options, recorder).close()
    assert [spell(note) for note in recorder.notes] == notes
