"""Small helpers for several tests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from exl_cli.engines.base import Chunk, Request, Summary
from exl_cli.engines.response import Decoder, Response, Step
from exl_cli.sampling import build

if TYPE_CHECKING:
    import pytest

# The dimensions of Mistral 7B, as its config.json has them.
MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


class Recorder:
    """A `loader.Observer` that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def progress(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def collect(chunks: Iterable[Chunk]) -> tuple[str, list[int], Summary]:
    """The text, the tokens and the summary of a whole stream."""
    parts = list(chunks)
    assert all(chunk.summary is None for chunk in parts[:-1])
    summary = parts[-1].summary
    assert summary is not None
    return "".join(chunk.text for chunk in parts), [token for chunk in parts for token in chunk.token_ids], summary


def respond(
    request: Request, decoder: Decoder, context_length: int, steps: Generator[Step, None, None]
) -> Iterator[Chunk]:
    """The chunks that an engine makes of these steps."""
    response = Response(request, decoder, context_length)
    try:
        for step in steps:
            yield from response.take(step)
            if response.ended:
                return
        yield response.finish()
    finally:
        steps.close()


def request_for(ids: Sequence[int], preset: str, max_new_tokens: int, seed: int = 0) -> Request:
    """A request with a preset's settings and no stop ids."""
    return Request(ids, build({}, preset), max_new_tokens, seed)


def nvidia_gpus(monkeypatch: pytest.MonkeyPatch, sizes: Sequence[int]) -> None:
    """Have NVIDIA's library know GPUs of these sizes in bytes, all of it free: "Card 0", "Card 1" and so on."""
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(sizes),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName="Card {}".format,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(total=sizes[index], free=sizes[index]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order of these


def exl(*args: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the `exl` command in a child process; its output is decoded as UTF-8, without newline translation."""
    result = subprocess.run([sys.executable, "-m", "exl_cli", *args], input=stdin, capture_output=True, env=env)
    return subprocess.CompletedProcess(args, result.returncode, result.stdout.decode(), result.stderr.decode())


def python(
    code: str, *args: str, path: Sequence[Path] = (), env: Mapping[str, str] | None = None, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run a program in a child process with this process's import path, after `path`."""
    folders = os.pathsep.join([*map(str, path), *filter(None, sys.path)])
    environment = {**os.environ, **(env or {}), "PYTHONPATH": folders}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that another thread or process does."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < end, "it never came"
        pause.wait(0.005)
