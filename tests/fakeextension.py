"""A stand-in for exllamav2's compiled extension: its Python code can load models on the CPU, but not run them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class FakeExtension(ModuleType):
    """What is called while a model loads."""

    def __init__(self) -> None:
        super().__init__("exllamav2_ext")
        self._handles = itertools.count(1)

    def make_group_map(self, groups: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.zeros(2 * rows, dtype=torch.short)

    def stloader_read(self, filename: str, offset: int, size: int, target: torch.Tensor) -> None:
        """What exllamav2 reads by itself."""
        with Path(filename).open("rb") as file:
            file.seek(offset)
            target.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("make_"):
            raise AttributeError(name)
        return lambda *arguments: next(self._handles)


def install() -> None:
    """Have the next import of exllamav2 take it."""
    sys.modules["exllamav2_ext"] = FakeExtension()
    # After each tensor exllamav2 waits for the GPU.
    torch.cuda.synchronize = lambda device=None: None
