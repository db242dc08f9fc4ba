"""The model that a chat talks to, and the loader that opens it and can switch to another during the chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.chat.prompt_encoder import PromptEncoder
from exl_cli.chat.session import Session
from exl_cli.chat.view import ChatView
from exl_cli.engines.base import Engine
from exl_cli.models import folders
from exl_cli.models.chat_template import Format, PlainFormat, load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.files import expanded, is_folder

# Context to allocate, in tokens, unless the user asks for another or the model allows less.
_DEFAULT_CONTEXT = 8192


@dataclass(eq=False)
class ChatModel:
    """A model to chat with; `ModelLoader.load` sets engine and encoder."""

    info: ModelInfo
    tokenizer: Tokenizer
    format: Format
    engine: EngineThread = field(init=False)
    encoder: PromptEncoder = field(init=False)

    @property
    def name(self) -> str:
        """A name that resolves to the model from any working directory: a folder's path is made absolute."""
        path = expanded(Path(self.info.name))
        return str(path.resolve()) if is_folder(path) else self.info.name

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation as text for `encoder`.

        Special tokens spelled out in a message are escaped and read as plain text. That includes answers: the model may
        have spelled one out, or the user may have edited the session file.
        """
        as_text = self.tokenizer.as_text
        hidden = [{k: v if k == "role" else as_text(v) for k, v in message.items()} for message in messages]
        return self.format.render(hidden, add_generation_prompt=add_generation_prompt)

    def check_system(self, session: Session) -> list[str]:
        """The special tokens spelled out in a session's system message; PromptError if the template rejects it."""
        text = self.render([*session.messages(0, 0), {"role": "user", "content": "Hello"}])
        return self.tokenizer.hidden(text)


class ModelLoader:
    """Opens and loads models for a chat.

    `load` is `loader.load`, or a replacement by a program that embeds exl (see `cli.options.State`).
    """

    def __init__(
        self, load: Callable[..., Engine], options: LoadOptions, models_dir: Path | None, view: ChatView
    ) -> None:
        self._load = load
        self._options = options
        self._models_dir = models_dir
        self._view = view

    def find(self, name: str | None) -> ChatModel:
        """Open a model's files without reading its weights; ExlError if there is none, or it cannot be run."""
        info = loader.resolve(name, self._models_dir)
        loader.context_to_allocate(info, self._options)
        return ChatModel(info, Tokenizer(info.path), load_format(info.path))

    def load(self, model: ChatModel) -> None:
        """Load a model into an engine with an empty cache; see `loader.load`."""
        info = model.info
        with self._view.loading(f"{info.name} ({info.format_name})") as progress:
            if isinstance(model.format, PlainFormat):
                progress.note(model.format.note)
            engine = self._load(info, model.tokenizer, self._options, progress, needed=_DEFAULT_CONTEXT)
        model.engine = EngineThread(engine)
        model.encoder = PromptEncoder(model.tokenizer, add_special_tokens=model.format.add_special_tokens)

    def names(self) -> list[str]:
        return folders.known_models(self._models_dir)
