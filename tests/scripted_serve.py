"""`exl serve` over a model that writes a long text slowly, as a program: it starts without torch.

A request with the seed 13 meets a fault that the GPU does not recover from, half a second later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

from fakes import ScriptedEngine

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Request
from exl_cli.engines.response import Step
from exl_cli.errors import DeviceError
from exl_cli.models.tokenizer import Tokenizer


class SlowEngine(ScriptedEngine):
    """A token every five milliseconds."""

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        for number, step in enumerate(super()._steps(request, is_cancelled)):
            threading.Event().wait(0.005)
            if request.seed == 13 and number == 100:
                raise DeviceError("an illegal memory access was encountered")
            if is_cancelled():
                return
            yield step


def load(info: Any, tokenizer: Tokenizer, *args: Any) -> Engine:
    return SlowEngine(tokenizer, "One two three four. " * 100, 1024)


if __name__ == "__main__":
    app(obj=State(load=load, owns_process=True))
