"""The models of a server: by which names they are known, loaded on demand, unloaded when others need their room."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Engine
from exl_cli.models.chat_template import Format, load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.server.errors import ApiError, as_api_error


@dataclass(eq=False)
class ServedModel:
    """A loaded model.

    Attributes:
        name: what responses call it.
        context_length: the most tokens of prompt and response together.
        created: Unix time of its loading.
        users: requests that hold it now.
    """

    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    chat_format: Format
    engine: EngineThread
    context_length: int
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0


class ModelPool:
    """The models that may be used, of which some are loaded.

    Args:
        models: each by its name; the first is the default.
        options: how each is loaded.
        observer: takes what loads have to tell.
        load: see `loader.load`.
    """

    def __init__(
        self,
        models: Mapping[str, ModelInfo],
        options: LoadOptions,
        observer: loader.Observer,
        load: Callable[..., Engine] = loader.load,
    ) -> None:
        self._models = dict(models)
        self._options, self._observer, self._load = options, observer, load
        self._loaded: dict[str, ServedModel] = {}
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "exl-load")

    def names(self) -> list[str]:
        """What a request may ask for."""
        return list(self._models)

    @property
    def loaded(self) -> list[ServedModel]:
        """The models in memory."""
        return list(self._loaded.values())

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """Hold a model, loaded first if need be; None or "" for the default.

        Raises:
            ApiError: 404 for an unknown name, 503 where it cannot be loaded.
        """
        name = name or next(iter(self._models))
        if name not in self._models:
            raise ApiError(404, f"the model {name!r} does not exist here", "model_not_found", "model")
        async with self._lock:
            if name not in self._loaded:
                try:
                    self._loaded[name] = await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._load_now, name
                    )
                except Exception as error:
                    raise as_api_error(error) from error
        model = self._loaded[name]
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    def _load_now(self, name: str) -> ServedModel:
        info = self._models[name]
        tokenizer = Tokenizer(info.path)
        chat_format = load_format(info.path)
        engine = EngineThread(self._load(info, tokenizer, self._options, self._observer))
        return ServedModel(name, info, tokenizer, chat_format, engine, engine.context_length)
