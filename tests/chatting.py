"""An engine to converse with: it has no model, but a memory, and says what it was told to say.

As a program it is the `exl` command with that engine: `python chatting.py '["answer", …]' ARGS…`.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fakes import ScriptedEngine
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner, Result

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Request
from exl_cli.engines.response import Step
from exl_cli.errors import OutOfMemoryError
from exl_cli.loader import Observer
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pytest

PAUSE = "⏸"  # in an answer: call the script's `pause`, then wait here until the generation is cancelled
FAIL = "💥"  # run out of memory here


@dataclass
class Script:
    """What engines say, and what they were asked.

    Attributes:
        answers: the texts of successive answers, over and over.
        spelled: generate each character as a token of its own, as tokenizing the text would not.
        together: tokens of one step, as with speculation.
        before: called with each request before its first token.
        pause: called at each `PAUSE`.
        cancelled: called when a generation that waits there has been cancelled.
        loads_fail: names of models that cannot be loaded.
        requests: all requests so far.
        engines: all engines loaded so far.
    """

    answers: Sequence[str]
    spelled: bool = False
    together: int = 1
    before: Callable[[Request], object] = lambda request: None
    pause: Callable[[], object] = lambda: None
    cancelled: Callable[[], object] = lambda: None
    loads_fail: tuple[str, ...] = ()
    requests: list[Request] = field(default_factory=list)
    engines: list[TalkingEngine] = field(default_factory=list)

    def load(
        self, info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions, observer: Observer, needed: int | None = None
    ) -> Engine:
        """In the place of `loader.load`."""
        if Path(info.name).name in self.loads_fail:
            raise OutOfMemoryError(f"{info.name} does not fit", "take a smaller one")
        observer.progress(1, 1)
        self.engines.append(TalkingEngine(self, tokenizer, options.max_seq_len or info.context_length))
        return self.engines[-1]


class TalkingEngine(ScriptedEngine):
    """Says the script's next answer, then the end-of-sequence token; keeps what it has computed, as a KV cache does."""

    def __init__(self, script: Script, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__(tokenizer, "", context_length)
        self._script = script
        self.held: list[int] = []

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        assert not self.closed
        answer = self._script.answers[len(self._script.requests) % len(self._script.answers)]
        self._script.requests.append(request)
        prompt = list(request.ids)
        pairs = zip(self.held, prompt[:-1], strict=False)
        reused = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.held), len(prompt) - 1))
        self.held = prompt[:-1]
        self._script.before(request)
        yield Step(prompt_seconds=0.001 * (len(prompt) - reused), reused_tokens=reused)
        last = prompt[-1]
        tokens = self._tokens(answer, is_cancelled)
        while step := tuple(itertools.islice(tokens, self._script.together)):
            self.held += [last, *step[:-1]]
            last = step[-1]
            yield Step(step)
        yield Step()

    def _tokens(self, answer: str, is_cancelled: Callable[[], bool]) -> Iterator[int]:
        for part in self._parts(answer):
            if part == PAUSE:
                self._script.pause()
                give_up = time.monotonic() + 30
                while not is_cancelled():
                    assert time.monotonic() < give_up
                    time.sleep(0.001)
                self._script.cancelled()
                return
            elif part == FAIL:
                raise OutOfMemoryError("the GPU ran out of memory", "use --cache q4")
            else:
                yield from self._tokenizer.encode(part, add_special_tokens=False)
        yield min(self._tokenizer.eos_ids)

    def _parts(self, answer: str) -> Iterator[str]:
        text = ""
        for char in answer:
            if char in (PAUSE, FAIL) or self._script.spelled:
                yield text
                yield char
                text = ""
            else:
                text += char
        yield text


def isolate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep a test away from the user's own files, editor and screen; returns the data folder."""
    monkeypatch.setenv("EXL_DATA_DIR", str(folder / "data"))
    monkeypatch.setenv("EXL_MODELS_DIR", str(folder / "models"))
    for name in ("VISUAL", "EDITOR", "DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder / "data"


def chat(script: Script, stdin: str | bytes, *args: str) -> Result:
    """`exl chat` with this script's engine and these lines."""
    return CliRunner().invoke(app, ["chat", *args], input=stdin, obj=State(load=script.load))


def prompts(script: Script, folder: Path) -> list[str]:
    """What the engine was given, special tokens included."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    return [backend.decode(list(request.ids), skip_special_tokens=False) for request in script.requests]


def saved(data: Path) -> dict[str, Any]:
    """The only saved session."""
    (file,) = (data / "sessions").glob("*.json")
    value: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return value


def turns(data: Path) -> list[tuple[str, str]]:
    """Who said what in it."""
    return [(turn["role"], turn["content"]) for turn in saved(data)["turns"]]


if __name__ == "__main__":
    app(sys.argv[2:], obj=State(load=Script(json.loads(sys.argv[1])).load))
