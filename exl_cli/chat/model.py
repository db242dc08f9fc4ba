"""The model a conversation is with: its files, its engine, and switching to another without leaving the chat."""

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
from exl_cli.models.chat_template import Format, load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.files import expanded, is_folder

# The context to allocate, in tokens, where the model allows it and the user asks for nothing else.
CONTEXT = 8192


@dataclass(eq=False)
class ChatModel:
    """A model to chat with.

    Attributes:
        info, tokenizer, format: the model, its tokenizer, and how a conversation is written for it.
        engine, encoder: the engine that runs it, and the encoder of that engine's prompts; set by `ModelLoader.load`.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    format: Format
    engine: EngineThread = field(init=False)
    encoder: PromptEncoder = field(init=False)

    @property
    def name(self) -> str:
        """The name to find it by from anywhere: a folder's path is made absolute."""
        path = expanded(Path(self.info.name))
        return str(path.resolve()) if is_folder(path) else self.info.name

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as text for `encoder`, with the special tokens that it spells hidden as plain text: those of
        answers too, which the model has spelled out, or an editor of the session's file."""
        as_text = self.tokenizer.as_text
        hidden = [{k: v if k == "role" else as_text(v) for k, v in message.items()} for message in messages]
        return self.format.render(hidden, add_generation_prompt=add_generation_prompt)

    def check_system(self, session: Session) -> list[str]:
        """The special tokens that a session's system message spells. Raises PromptError if the model's template refuses
        it."""
        text = self.render([*session.messages(0, 0), {"role": "user", "content": "Hello"}])
        return self.tokenizer.hidden(text)


class ModelLoader:
    """Finds and loads the models of a chat; `load` is `loader.load` or an embedder's own (see `cli.options.State`)."""

    def __init__(
        self, load: Callable[..., Engine], options: LoadOptions, models_dir: Path | None, view: ChatView
    ) -> None:
        self._load = load
        self._options = options
        self._models_dir = models_dir
        self._view = view

    def find(self, name: str | None) -> ChatModel:
        """Open a model's files, without reading a weight. Raises all that can be wrong with them."""
        info = loader.resolve(name, self._models_dir)
        loader.context_to_allocate(info, self._options)
        return ChatModel(info, Tokenizer(info.path), load_format(info.path))

    def load(self, model: ChatModel) -> None:
        """Start a model's engine, with nothing computed yet; see `loader.load`."""
        info = model.info
        with self._view.loading(f"{info.name} ({info.format_name})") as progress:
            engine = self._load(info, model.tokenizer, self._options, progress, needed=CONTEXT)
        model.engine = EngineThread(engine)
        model.encoder = PromptEncoder(model.tokenizer, add_special_tokens=model.format.add_special_tokens)

    def names(self) -> list[str]:
        return folders.known_models(self._models_dir)
