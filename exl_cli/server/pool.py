"""The models of a server: by which names they are known, loaded on demand, unloaded when others need their room."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Engine, Request
from exl_cli.errors import ModelNotFoundError, OutOfMemoryError, brief, param
from exl_cli.models import folders, placement
from exl_cli.models.chat_template import Format, PlainFormat, load_format
from exl_cli.models.hub import store
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling
from exl_cli.server.errors import as_api_error
from exl_cli.system.readings import DeviceMemory, read_gpus
from exl_cli.system.units import gib

T = TypeVar("T")

# Sequences that the KV cache gets room for where nobody says how many: the first of these that fits.
_SEQUENCES = (8, 4, 2)
# Prompts of a model that are rendered and tokenized at the same time.
_PROMPT_THREADS = 8


class Catalog:
    """The names that a request may ask for, and the models behind them. Nothing else of a request leads to a file.

    Args:
        models: by name; the first is the default.
        aliases: further names of these.
        folder: the models in it may be asked for as well.
        any_name: every other name means the default.
    """

    def __init__(
        self,
        models: Mapping[str, ModelInfo],
        aliases: Mapping[str, str] | None = None,
        folder: Path | None = None,
        *,
        any_name: bool = False,
    ) -> None:
        self._models = dict(models)
        self._aliases = dict(aliases or {})
        self._folder, self._any_name = folder, any_name
        self.default = next(iter(models))

    def names(self) -> list[str]:
        """All names, aliases last."""
        return [*dict.fromkeys([*self._models, *self._in_folder(), *self._aliases])]

    def named(self, name: str | None) -> str | None:
        """The own name of a model that was named when the server started; that of the default for None and ""."""
        name = self._aliases.get(name or self.default, name or self.default)
        return name if name in self._models else None

    def find(self, name: str) -> str:
        """The own name of any other; the folder is read again each time.

        Raises:
            ModelNotFoundError: it is unknown.
        """
        here = self._in_folder()
        if own := next((own for own, path in here.items() if name in (own, path.name)), None):
            return own
        if self._any_name:
            return self.default
        raise ModelNotFoundError(f"no model named {brief(name)!r}", "GET /v1/models lists them")

    def info(self, name: str) -> ModelInfo:
        """What the model of that own name is."""
        return self._models.get(name) or loader.resolve(str(self._in_folder()[name]))

    def _in_folder(self) -> dict[str, Path]:
        paths = [] if self._folder is None else folders.model_folders(self._folder)
        whole = [path for path in paths if store.state(path) != "partial"]
        return {str(marker.repository) if (marker := store.read_marker(path)) else path.name: path for path in whole}


class ServedModel:
    """A loaded model.

    Attributes:
        name: what responses call it.
        info, tokenizer, chat_format, engine: its parts.
        context_length: the most tokens of prompt and response together.
        created: Unix time of its loading.
        users: requests that hold it; it is not unloaded meanwhile.
        submitted: generations that its engine has, running and waiting.
        idle_timer: unloads it, unless it is used before.
    """

    def __init__(
        self, name: str, info: ModelInfo, tokenizer: Tokenizer, chat_format: Format, engine: EngineThread
    ) -> None:
        self.name, self.info, self.tokenizer, self.chat_format, self.engine = name, info, tokenizer, chat_format, engine
        self.context_length = engine.context_length
        self.created = int(time.time())
        self.users = self.submitted = 0
        self.last_used = time.monotonic()
        self.idle = asyncio.Event()
        self.idle_timer: asyncio.TimerHandle | None = None
        self._threads = ThreadPoolExecutor(_PROMPT_THREADS, "exl-prompt")

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that renders or tokenizes.

        In a thread that ends with the model: in each thread, `tokenizers` caches up to 10,000 words (some 5 MB) of each
        tokenizer, and frees them only when the thread ends.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def close(self) -> None:
        """Close the engine and end the threads; waits for the engine."""
        self._threads.shutdown(wait=False)
        self.engine.close()

    @property
    def running(self) -> int:
        """Generations that its engine computes now."""
        return min(self.submitted, self.engine.max_batch)


@dataclasses.dataclass(eq=False)
class _Loading:
    """A load that requests wait for; it goes on without them."""

    task: asyncio.Task[ServedModel]
    waiting: int = 0


class ModelPool:
    """The models of a catalog, of which some are loaded.

    Args:
        catalog: see there.
        options: how each is loaded.
        observer: takes what loads have to tell.
        load: see `loader.load`.
        sequences: that the KV cache has room for; None for as many as fit, 8 at most.
        max_loaded: models in memory at once.
        idle_seconds: after which a model that nobody uses is unloaded; None for never.
    """

    def __init__(
        self,
        catalog: Catalog,
        options: LoadOptions,
        observer: loader.Observer,
        load: Callable[..., Engine] = loader.load,
        *,
        sequences: int | None = None,
        max_loaded: int = 1,
        idle_seconds: float | None = None,
    ) -> None:
        self.catalog = catalog
        self._options, self._observer, self._load = options, observer, load
        self._sequences, self._max_loaded, self._idle_seconds = sequences, max_loaded, idle_seconds
        self._loaded: dict[str, ServedModel] = {}
        self._loads: dict[str, _Loading] = {}
        self._turn = asyncio.Lock()  # to load or unload; first come, first served
        self._thread = ThreadPoolExecutor(1, "exl-load")

    @property
    def loaded(self) -> list[ServedModel]:
        """The models in memory that take requests."""
        return list(self._loaded.values())

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """Hold a model, loaded first if need be; None or "" for the default.

        Raises:
            ApiError: 404 for an unknown name, 503 where it cannot be loaded.
        """
        model = await self._hold(name)
        try:
            yield model
        finally:
            self._release(model)

    async def unload(self, name: str) -> bool:
        """Unload a model unless it is in use; False where it is not loaded, or in use."""
        async with self._turn:
            model = self._loaded.get(name)
            if model is None or model.users:
                return False
            await self._retire(model)
            return True

    async def close(self) -> None:
        """Unload everything, in use or not."""
        for model in self.loaded:
            model.engine.close(wait=False)
        for model in self.loaded:
            await self._in_thread(model.close)
        self._loaded.clear()

    async def _hold(self, name: str | None) -> ServedModel:
        try:
            own = self.catalog.named(name)
            if own is None:
                own = await asyncio.to_thread(self.catalog.find, name or "")
            if (model := self._loaded.get(own)) is None:
                return await self._wait_for_load(own)
        except Exception as error:
            raise as_api_error(error) from error
        model.users += 1
        model.idle.clear()
        return model

    async def _wait_for_load(self, name: str) -> ServedModel:
        load = self._loads.get(name)
        if load is None:
            load = self._loads[name] = _Loading(asyncio.create_task(self._load_in_turn(name)))
            load.task.add_done_callback(_seen)
        load.waiting += 1
        try:
            return await asyncio.shield(load.task)  # which counts this request among its users
        except BaseException:
            load.waiting -= 1
            if load.task.done() and not load.task.cancelled() and load.task.exception() is None:
                self._release(load.task.result())
            raise

    def _release(self, model: ServedModel) -> None:
        model.users -= 1
        model.last_used = time.monotonic()
        if not model.users:
            model.idle.set()
            if self._idle_seconds is not None:
                _cancel(model.idle_timer)  # of the request before
                loop = asyncio.get_running_loop()
                model.idle_timer = loop.call_later(self._idle_seconds, self._after_idling, model)

    # --- one at a time --------------------------------------------------------------------------------------------

    async def _load_in_turn(self, name: str) -> ServedModel:
        async with self._turn:
            try:
                model = await self._load_with_room(name)
            finally:
                load = self._loads.pop(name)
            model.users = load.waiting
            self._loaded[name] = model
            if not model.users:
                model.users = 1
                self._release(model)
            return model

    async def _load_with_room(self, name: str) -> ServedModel:
        info = await self._in_thread(lambda: self._estimated(name))
        while len(self._loaded) >= self._max_loaded:
            await self._retire(min(self.loaded, key=lambda model: (model.users > 0, model.last_used)))
        while True:
            try:
                return await self._in_thread(lambda: self._load_now(name, info))
            except OutOfMemoryError:
                idle = [model for model in self.loaded if not model.users]
                if not idle:
                    raise
                await self._retire(min(idle, key=lambda model: model.last_used))

    async def _retire(self, model: ServedModel) -> None:
        """Unload a model once those who use it are done; who asks for it from now on waits until it is loaded again."""
        del self._loaded[model.name]
        if model.users:
            await model.idle.wait()
        _cancel(model.idle_timer)
        gpus = model.engine.memory()
        before = await self._in_thread(lambda: _used(gpus))
        await self._in_thread(model.close)
        after = await self._in_thread(lambda: _used(gpus))
        freed = f"; {gib(before - after)} of GPU memory freed, {gib(after)} still in use" if gpus else ""
        self._observer.note(f"unloaded {model.name}{freed}")

    def _after_idling(self, model: ServedModel) -> None:
        if self._is_idle(model):
            task = asyncio.get_running_loop().create_task(self._unload_idle(model))
            task.add_done_callback(_seen)

    async def _unload_idle(self, model: ServedModel) -> None:
        async with self._turn:
            if self._is_idle(model):
                await self._retire(model)

    def _is_idle(self, model: ServedModel) -> bool:
        idle_seconds = time.monotonic() - model.last_used
        return self._loaded.get(model.name) is model and not model.users and idle_seconds >= (self._idle_seconds or 0)

    # --- in a thread ----------------------------------------------------------------------------------------------

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _estimated(self, name: str) -> ModelInfo:
        """The model, refused here if it would not fit with all others unloaded."""
        info = self.catalog.info(name)
        gpus = loader.gpus_for(info, self._options)
        needed = loader.memory_needed(info, self._options, self._sequences or 1)
        if gpus and needed is not None and not placement.fits(needed, [gpu.total for gpu in gpus]):
            total = gib(sum(gpu.total for gpu in gpus))
            raise OutOfMemoryError(
                f"{name} needs about {gib(needed.total)} of GPU memory, but there is {total}",
                f"use {param('cache')} q4, a smaller {param('max_seq_len')} or a smaller quantization",
            )
        return info

    def _fitting(self, info: ModelInfo) -> int:
        """Sequences to make room for."""
        if self._sequences is not None:
            return self._sequences
        return loader.fitting_sequences(info, self._options, _SEQUENCES)

    def _load_now(self, name: str, info: ModelInfo) -> ServedModel:
        tokenizer = Tokenizer(info.path)
        chat_format = load_format(info.path)
        if isinstance(chat_format, PlainFormat):
            self._observer.note(f"{name}: {chat_format.note}")
        options = dataclasses.replace(self._options, sequences=self._fitting(info))
        engine = EngineThread(self._load(info, tokenizer, options, self._observer))
        try:
            # What is compiled or captured at first use is compiled and captured now.
            ids = tokenizer.encode("Hello", add_special_tokens=True)[:1] or [0]
            for _ in engine.stream(Request(ids, Sampling(), 2, seed=0)):
                pass
        except BaseException:
            engine.close()
            raise
        return ServedModel(name, info, tokenizer, chat_format, engine)


def _used(gpus: Sequence[DeviceMemory]) -> int:
    """Bytes in use on these GPUs, by any program."""
    return sum(reading.used_bytes or 0 for reading in read_gpus(gpus))


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _seen(task: asyncio.Task[Any]) -> None:
    """Take note of how a task ended, which asyncio reports else where nobody waits for it."""
    if not task.cancelled():
        task.exception()
