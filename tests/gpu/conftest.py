"""GPU tests: they need an NVIDIA GPU and exllamav2's compiled extension."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NoReturn

import pytest
import torch

_HERE = Path(__file__).parent
_MISSING = "" if torch.cuda.is_available() else "no CUDA GPU"
if not _MISSING and importlib.util.find_spec("exllamav2") is None:
    _MISSING = "exllamav2 is not installed"


class _Skip(pytest.Item):
    """All tests of a file."""

    def runtest(self) -> NoReturn:
        pytest.skip(_MISSING)


class _Skipped(pytest.Module):
    """A file that cannot run here and is not imported: its tests would take seconds to be skipped one by one."""

    def collect(self) -> list[pytest.Item]:
        return [_Skip.from_parent(self, name="all")]


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return _Skipped.from_parent(parent, path=module_path) if _MISSING else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
