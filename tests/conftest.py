"""Shared paths of the tests. Models used as data: fable-7m in its EXL2 (built-in) and GPTQ forms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# For these small models, threads cost more than they bring, and far more where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def exl2_dir() -> Path:
    return ROOT / "exl_cli" / "assets" / "fable-7m"


@pytest.fixture(scope="session")
def gptq_dir() -> Path:
    return DATA / "fable-7m-gptq"


@pytest.fixture(scope="session")
def golden_path() -> Path:
    return DATA / "golden-fable-7m.npz"
