"""What the commands of one process share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from exl_cli import loader
from exl_cli.engines.base import Engine


@dataclass
class State:
    """Typer's context object.

    Attributes:
        debug: show tracebacks.
        load: how a model is loaded; `loader.load` unless whoever embeds the app has an engine of its own.
    """

    debug: bool = False
    load: Callable[..., Engine] = loader.load
