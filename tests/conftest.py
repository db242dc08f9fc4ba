"""Shared paths and fixtures. Test data: fable-7m in EXL2 (built in) and GPTQ."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.testing

if TYPE_CHECKING:
    from fakehub import FakeHub
    from hubtools import Fetcher

# For these small models, threads cost more than they bring, and far more where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nothing is asked over TLS, and httpx reads the certificates of all authorities for each request that has no client.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent / "data")

# Without compiled code at hand, each `exl` that a test starts would compile the package again, for longer than it runs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Nothing that is imported is garbage, until the interpreter ends. A worker, whose exit code nobody reads, ends without
# taking torch and transformers apart, which takes seconds.
gc.disable()
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)
else:
    atexit.register(gc.unfreeze)

# Typer would build all of the commands for each call of one.
typer.testing._get_command = functools.cache(typer.main.get_command)

# The same examples each time, however slow the machine is; `--hypothesis-profile default` tries new ones.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
    settings.load_profile("repeatable")

# Files whose tests import transformers, which takes longer than most of them.
NEED_TRANSFORMERS = frozenset([
    "anthropic", "api", "architecture_forward", "architecture_reading", "architectures", "chat_reuse",
    "chat_template", "chat_template_files", "configs", "cpu_engine", "cpu_flags", "docs", "doctor_checks", "filters",
    "formats", "gptq_settings", "hints", "langchain", "langchain_sharing", "langchain_standard", "loader",
    "openai_server", "output_tokens", "serve", "template_helper", "tokenizer",
])  # fmt: skip

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"


# Modules that the garbage collector passes over.
_passed_over = 0


def _pass_over_modules() -> None:
    """Keep the garbage collector from looking through torch and transformers for each engine that is closed.

    At the end, too, when pytest collects five times: what earlier modules left is collected here.
    """
    global _passed_over
    gc.collect()
    gc.freeze()
    _passed_over = len(sys.modules)


@pytest.fixture(scope="module", autouse=True)
def _little_for_the_collector() -> None:
    _pass_over_modules()


def pytest_runtest_teardown() -> None:
    if len(sys.modules) > _passed_over + 200:
        _pass_over_modules()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need transformers come first: of several workers, the first has them all and alone imports it."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in NEED_TRANSFORMERS)


def pytest_collection_finish() -> None:
    gc.enable()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def exl2_dir() -> Path:
    return ROOT / "exl_cli" / "models" / "builtin" / "fable-7m"


@pytest.fixture(scope="session")
def gptq_dir() -> Path:
    return DATA / "fable-7m-gptq"


@pytest.fixture(scope="session")
def golden_path() -> Path:
    return DATA / "golden-fable-7m.npz"


@pytest.fixture(scope="session")
def kernels_folder(request: pytest.FixtureRequest) -> Path:
    """Where kernels compiled for the CPU are, from one run of the tests to the next."""
    from kernels.emulated import keep

    return keep(request.config.cache.mkdir("kernels"))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A Hub on loopback, empty."""
    from fakehub import FakeHub

    with FakeHub() as fake:
        yield fake


@pytest.fixture
def fetch(hub: FakeHub, tmp_path: Path) -> Fetcher:
    """Downloads from it, in this process; acme/tiny is there."""
    from hubtools import Fetcher, model_files

    hub.repository("acme/tiny", model_files())
    return Fetcher(hub, tmp_path / "models")
