"""GPU tests: they need an NVIDIA GPU and exllamav2's compiled extension."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them where they cannot run."""
    missing = "" if torch.cuda.is_available() else "no CUDA GPU"
    if not missing and importlib.util.find_spec("exllamav2") is None:
        missing = "exllamav2 is not installed"
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))
