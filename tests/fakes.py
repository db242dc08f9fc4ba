"""A scripted engine: yields given tokens through the real interface."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from exl_cli.engines.base import Engine, Request
from exl_cli.engines.response import Decoder, GeneratorEngine, Step
from exl_cli.loader import Observer
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.readings import DeviceMemory


class ScriptedEngine(GeneratorEngine):
    """Generates the tokens of a fixed text, then the model's end-of-sequence token."""

    name = "scripted"

    def __init__(self, tokenizer: Tokenizer, answer: str, context_length: int) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._answer = answer
        self.context_length = context_length
        self.facts = {"device": "none"}
        self.requests: list[Request] = []
        self.closed = False

    def add(self, request_id: int, request: Request) -> None:
        self.requests.append(request)
        super().add(request_id, request)

    def _decoder(self, request: Request) -> Decoder:
        return self._tokenizer.decode_stream(request.ids)

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        yield Step(prompt_seconds=0.5)
        for token in self._tokenizer.encode(self._answer, add_special_tokens=False):
            yield Step((token,))
        yield Step((min(self._tokenizer.eos_ids),))

    def logits(self, ids: Sequence[int]) -> Any:
        """It has no opinion: every token is as likely as any other."""
        import torch

        return torch.zeros(len(ids), self._tokenizer.vocab_size)

    def memory(self) -> list[DeviceMemory]:
        return []

    def close(self) -> None:
        self.closed = True


class ScriptedLoader:
    """Loads `ScriptedEngine`s in the place of `loader.load`, and remembers them."""

    def __init__(self, answer: str) -> None:
        self._answer = answer
        self.engines: list[ScriptedEngine] = []
        self.options: LoadOptions | None = None

    def __call__(
        self, info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions, observer: Observer, needed: int | None = None
    ) -> Engine:
        self.options = options
        observer.note(f"loading from {Path(info.path).name}")
        observer.progress(1, 1)
        self.engines.append(ScriptedEngine(tokenizer, self._answer, options.max_seq_len or info.context_length))
        return self.engines[-1]
