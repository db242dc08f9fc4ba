"""`exl batch` over a model whose answers depend on prompt and seed alone, as a program: it starts without torch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from typing import Any

from fakes import ScriptedEngine

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Request
from exl_cli.engines.response import Step
from exl_cli.models.tokenizer import Tokenizer


class SeededEngine(ScriptedEngine):
    """Random tokens, one every three milliseconds."""

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        yield Step(prompt_seconds=0.5)
        rng = random.Random(f"{request.seed} {list(request.ids)}")
        while not is_cancelled():
            time.sleep(0.003)
            yield Step((rng.randrange(1000, 2000),))


def load(info: Any, tokenizer: Tokenizer, *args: Any) -> Engine:
    return SeededEngine(tokenizer, "", 1024)


if __name__ == "__main__":
    app(obj=State(load=load, owns_process=True))
