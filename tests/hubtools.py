"""Helpers for the download tests: small models, a recording observer, a clean environment."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakehub import FakeHub
from typer.testing import CliRunner, Result

from exl_cli.cli.app import app
from exl_cli.models.hub import names, store
from exl_cli.models.hub.client import Hub
from exl_cli.models.hub.download import Outcome, Plan, Wanted, download
from exl_cli.models.hub.files import File

WEIGHTS = "model.safetensors"


def safetensors(size: int, seed: int = 0) -> bytes:
    """A safetensors file whose one tensor has that many bytes."""
    header = json.dumps(
        {"model.layers.0.mlp.up_proj.weight": {"dtype": "F16", "shape": [size // 2, 1], "data_offsets": [0, size]}}
    ).encode()
    pattern = bytes((i * (2 * seed + 7) + seed) % 251 for i in range(251 * 8))
    return struct.pack("<Q", len(header)) + header + (pattern * (size // len(pattern) + 1))[:size]


def config(**more: Any) -> bytes:
    """A config.json that can be inspected."""
    return json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024, **more}).encode()


def model_files(size: int = 200_000, seed: int = 0) -> dict[str, bytes]:
    """The files of a small model, all of which exl fetches."""
    return {
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
        "config.json": config(),
        "tokenizer.json": b'{"model": {}}',
        WEIGHTS: safetensors(size, seed),
    }


class Fetcher:
    """Downloads from a fake Hub into a folder, and remembers; the waits that it would have made are in `waits`."""

    def __init__(self, fake: FakeHub, models: Path) -> None:
        self.fake, self.models = fake, models
        self.waits: list[float] = []
        self.notes: list[str] = []
        self.plan: Plan | None = None
        self.bytes: Counter[str] = Counter()
        self.noted: Callable[[], object] = lambda: None

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.noted()

    def begin(self, plan: Plan) -> None:
        self.plan = plan

    def advance(self, name: str, count: int) -> None:
        self.bytes[name] += count

    def hub(self, token: str | None = None, timeout: float = 10.0) -> Hub:
        return Hub(token, self.note, endpoint=self.fake.url, timeout=timeout, wait=self.waits.append)

    def wanted(self, model: str, **options: Any) -> Wanted:
        return Wanted(names.require(model), self.models, **options)

    def leave_part(self, model: str, content: bytes) -> None:
        """Leave so much of the weights as an interrupted download does."""
        wanted = self.wanted(model)
        file = next(file for file in self.hub().listing(wanted.repository).files if file.name == WEIGHTS)
        begin(wanted.folder, model, 1)
        store.part(wanted.folder, file).write_bytes(content)

    def __call__(self, model: str, token: str | None = None, timeout: float = 10.0, **options: Any) -> Outcome:
        return download(self.hub(token, timeout), self.wanted(model, **options), self)


def download_command(fake: FakeHub, models: Path, *args: str, **env: str) -> Result:
    """`exl download` in this process."""
    arguments = ["download", *args, "--models-dir", str(models)]
    return CliRunner().invoke(app, arguments, env={"HF_ENDPOINT": fake.url, **env})


def shell(fake: FakeHub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a user who is not logged in, for commands that are to talk to the fake Hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "EXL_", "HUGGING"))}
    own = {"HF_ENDPOINT": fake.url, "HF_HOME": str(home / "hf"), "EXL_MODELS_DIR": str(home / "models")}
    return {**kept, **own, "HF_HUB_DISABLE_XET": "1", "PYTHONUNBUFFERED": "1", **more}


def begin(folder: Path, repository: str, total: int, revision: str = "main") -> None:
    """Leave what a download of so many bytes leaves that has fetched nothing yet."""
    files = {WEIGHTS: File(WEIGHTS, total)}
    store.prepare_staging(folder, store.Marker(names.require(repository, revision), "c" * 40, files))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder by name, exl's own marker left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".exl.json"
    }
