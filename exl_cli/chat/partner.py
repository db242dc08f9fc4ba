"""The model that is talked to: found, opened, and exchanged for another without leaving the conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exl_cli import loader
from exl_cli.chat.composer import Composer
from exl_cli.chat.view import ChatView
from exl_cli.engines.base import Engine
from exl_cli.models import folders
from exl_cli.models.chat_format import Format, load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.interrupts import insist_on_interrupt

# What a conversation is given where the model allows it and nothing else is asked for.
CONTEXT = 8192


@dataclass(frozen=True)
class Model:
    """A model as its files describe it, not loaded.

    Attributes:
        info: what it is.
        tokenizer: its tokenizer.
        format: how a conversation is written for it.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    format: Format

    @property
    def name(self) -> str:
        """The name under which it is found again from anywhere: folders are made absolute."""
        path = Path(self.info.name).expanduser()
        return str(path.resolve()) if path.is_dir() else self.info.name


@dataclass(frozen=True)
class Partner:
    """A loaded model.

    Attributes:
        model: what it is.
        engine: what computes it.
        composer: what the engine has computed so far.
    """

    model: Model
    engine: Engine
    composer: Composer


class Host:
    """Finds and loads models.

    Args:
        load: see `state.State.load`.
        options: the load flags, for every model of this chat.
        models_dir: the folder of downloaded models, or None for the usual one.
        view: shows the loading.
    """

    def __init__(
        self, load: Callable[..., Engine], options: LoadOptions, models_dir: Path | None, view: ChatView
    ) -> None:
        self._load = load
        self._options = options
        self._models_dir = models_dir
        self._view = view

    def find(self, name: str | None) -> Model:
        """A model by name; all that can be wrong with its files comes out here, before any weight is read.

        Raises:
            ModelNotFoundError, UnsupportedModelError, DamagedModelError, PromptError, UsageError: see `loader.resolve`,
                `Tokenizer`, `load_format` and `loader.context_to_allocate`.
        """
        info = loader.resolve(name, self._models_dir)
        loader.context_to_allocate(info, self._options)
        return Model(info, Tokenizer(info.path), load_format(info.path))

    def load(self, model: Model) -> Partner:
        """Load it.

        Raises:
            EngineError, OutOfMemoryError, UnsupportedModelError, DamagedModelError: see `loader.load`.
        """
        info = model.info
        with insist_on_interrupt(), self._view.loading(f"{info.name} ({info.format_name})") as progress:
            engine = self._load(info, model.tokenizer, self._options, progress, needed=CONTEXT)
        return Partner(model, engine, Composer(model.tokenizer, add_special_tokens=model.format.add_special_tokens))

    def names(self) -> list[str]:
        """The models that can be named without a path."""
        return folders.known_models(self._models_dir)
