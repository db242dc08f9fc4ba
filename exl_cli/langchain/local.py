"""Base of both LangChain classes: fields, shared engines, per-call options."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.messages import BaseMessage, convert_to_openai_messages
from langchain_core.runnables.config import run_in_executor
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from exl_cli import loader
from exl_cli.api import model as api
from exl_cli.api import records
from exl_cli.api.engine_thread import in_engine_thread
from exl_cli.api.streams import AsyncStream, Generation, Stream
from exl_cli.errors import PromptError, UsageError
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import CacheType, EngineChoice, LoadOptions, Speculation

# Arguments of langchain_community's class that took exllamav2 objects, and what to use instead.
_REFUSED = {
    "client": "exl loads the model itself",
    "config": "exl reads the model's files itself; context, cache and GPUs are max_seq_len, kv_cache and gpu_split",
    "disallowed_tokens": "exl cannot ban single tokens",
    "exllama_cache": "exl creates the cache itself, from kv_cache and max_seq_len",
    "generator": "exl has its own generator",
    "logfunc": "verbose prints to stdout",
    "tokenizer": "exl reads the model's tokenizer itself",
}

# Fields that are load options; `kv_cache` is `cache` in `LoadOptions`.
_LOADING = ("engine", "max_seq_len", "kv_cache", "gpu_split", "low_mem", "sequences", "speculate", "draft")

# LangChain's arguments for tool calls.
_TOOLS = ("tools", "tool_choice", "functions", "function_call", "response_format")


def as_prompt(prompt: str | list[BaseMessage]) -> str | list[dict[str, Any]]:
    """Convert LangChain messages to OpenAI's format with parsed tool arguments, as chat templates expect; keep text.

    Raises:
        PromptError: a message contains something other than text.
    """
    if isinstance(prompt, str):
        return prompt
    turns = convert_to_openai_messages(prompt, text_format="block")
    return [_turn(turn) for turn in (turns if isinstance(turns, list) else [turns])]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    blocks = turn.get("content") or []
    if isinstance(blocks, str):
        blocks = [{"type": "text", "text": blocks}]
    if other := sorted({str(block["type"]) for block in blocks} - {"text"}):
        raise PromptError(f"a message contains {', '.join(other)}, but exl's models only accept text", "send text")
    turn = {**turn, "content": "".join(block["text"] for block in blocks)}
    if calls := turn.get("tool_calls"):
        functions = [{**call["function"], "arguments": json.loads(call["function"]["arguments"])} for call in calls]
        turn["tool_calls"] = [{**call, "function": f} for call, f in zip(calls, functions, strict=True)]
    return turn


@dataclass(frozen=True)
class Call:
    """One call: a loaded model and all arguments but the prompt.

    Attributes:
        model_name: the name the user gave.
        model: the loaded model.
        options: arguments of `Model.stream`.
    """

    model_name: str
    model: api.Model
    options: dict[str, Any]

    def stream(self, prompt: Any) -> Stream:
        """Start generating from text or LangChain messages."""
        return self.model.stream(as_prompt(prompt), **self.options)

    def astream(self, prompt: Any) -> AsyncStream:
        """`stream`, for the running event loop."""
        return self.model.astream(as_prompt(prompt), **self.options)

    def facts(self, generation: Generation) -> dict[str, Any]:
        """Response metadata: finish reason, token counts, timings, seed."""
        summary = generation.summary
        return {
            "model_name": self.model_name,
            "model_provider": "exllamav2",
            **records.summarized(summary),
            "prompt_tokens_per_second": summary.prompt_rate,
            "generation_tokens_per_second": summary.generation_rate,
            "seed": generation.seed,
        }


class Loaded:
    """A loaded model with a reference count; closed when the count drops to 0 or this object is garbage-collected.

    Attributes:
        model: the model.
        users: the reference count.
    """

    def __init__(self, model: api.Model) -> None:
        self.model = model
        self.users = 0
        # Not at exit, where the operating system frees everything.
        weakref.finalize(self, model.close, wait=False).atexit = False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Pickles and deep copies do not carry the engine; they acquire their own.
        return type(None), ()


# Reentrant: the garbage collector may end an abandoned generation, and so call `release`, at any moment.
lock = threading.RLock()
_loaded: weakref.WeakValueDictionary[tuple[Path, LoadOptions], Loaded] = weakref.WeakValueDictionary()


def acquire(info: ModelInfo, options: LoadOptions) -> Loaded:
    """Return the shared model, loading it if needed, one load at a time. The caller releases it.

    Raises:
        ExlError: see `api.load`.
    """
    key = (info.path.resolve(), options)
    with lock:
        while True:
            loaded = _loaded.get(key)
            if loaded is None or loaded.model.closed:
                loaded = _loaded[key] = Loaded(api.load_resolved(info, options))
            loaded.users += 1
            if not loaded.model.closed:
                return loaded


def release(loaded: Loaded) -> None:
    """Drop one reference; for the last one, return once the memory is free.

    In an engine thread, do it in another thread. The garbage collector may call this there, while another thread holds
    the lock and waits for the engine thread.
    """
    if not in_engine_thread():
        _release(loaded)
        return
    with contextlib.suppress(RuntimeError):  # no new threads while the interpreter exits
        threading.Thread(target=_release, args=(loaded,), name="exl-release").start()


def _release(loaded: Loaded) -> None:
    with lock:
        loaded.users -= 1
        if loaded.users == 0:
            loaded.model.close()


def _release_unused(acquiring: asyncio.Future[Loaded]) -> None:
    """Release an engine whose task was cancelled while acquiring it."""
    if not acquiring.cancelled() and acquiring.exception() is None:
        threading.Thread(target=release, args=(acquiring.result(),), name="exl-release").start()


class LocalModel(BaseModel):
    """Common fields and methods of `ExLlamaV2` and `ChatExLlamaV2`.

    Construction raises:
        ExlError: the model cannot be found or loaded, or a setting is invalid; see `exl_cli.load`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(frozen=True, validation_alias=AliasChoices("model", "model_path", "model_name"))
    """A folder, a downloaded "owner/name[:revision]", or "fable-7m", the built-in model."""

    settings: Any = Field(default=None, validation_alias=AliasChoices("settings", "sampling"))
    """Sampler settings: a `Sampling`, a mapping of some of its fields, or exllamav2's settings object. Fields not given
    come from the model's generation_config.json, else from the defaults of `Sampling`."""

    temperature: float | None = None
    """Softmax temperature; overrides that of `settings`."""

    max_new_tokens: int = Field(default=150, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    """Most tokens to generate."""

    stop_sequences: list[str] = Field(default_factory=list, validation_alias=AliasChoices("stop_sequences", "stop"))
    """Strings that end the response, case-sensitive. Replaced by a call's `stop`."""

    seed: int | None = None
    """Makes responses reproducible; None for a random seed per call."""

    timeout: float | None = None
    """Seconds for a complete response, including time in the queue; None for no limit."""

    engine: EngineChoice = Field(default="auto", frozen=True)
    """See `exl_cli.load` for this and the next eight; `kv_cache` is its `cache`, a name that LangChain uses."""

    max_seq_len: int | None = Field(default=None, frozen=True)
    kv_cache: CacheType = Field(default="fp16", frozen=True)
    gpu_split: Sequence[float] | None = Field(default=None, frozen=True)
    low_mem: bool = Field(default=False, frozen=True)
    sequences: int = Field(default=1, frozen=True)
    speculate: Speculation = Field(default="off", frozen=True)
    draft: str | Path | None = Field(default=None, frozen=True)
    models_dir: str | Path | None = Field(default=None, frozen=True)

    max_retries: int | None = Field(default=None, exclude=True)
    """Ignored, like `api_key`: a local model has no connection to retry and no key."""

    api_key: Any = Field(default=None, exclude=True, repr=False)

    _info: ModelInfo = PrivateAttr()
    _options: LoadOptions = PrivateAttr()
    _claim: Loaded | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _refuse_parts(cls, values: Any) -> Any:
        """Refuse arguments of langchain_community's class, naming the replacement."""
        if not isinstance(values, dict):
            return values
        for name, reason in _REFUSED.items():
            if values.get(name):
                raise UsageError(f"{cls.__name__} does not accept {name}: {reason}", f"remove {name}")
        return {name: value for name, value in values.items() if name not in _REFUSED}

    @model_validator(mode="after")
    def _load(self) -> LocalModel:
        self._info = self._resolve(self.model)
        given = {name.removeprefix("kv_"): getattr(self, name) for name in _LOADING}
        given["gpu_split"] = None if self.gpu_split is None else tuple(self.gpu_split)
        given["draft"] = None if self.draft is None else str(self.draft)
        self._options = loader.with_draft(LoadOptions(**given), self._models)
        sampling = api.choose(self._info.generation_config, *self._layers())
        self._say(f"{sampling.brief()}\nLoading model: {self.model}")
        self._claim = acquire(self._info, self._options)
        self._say(f"stop_sequences {self.stop_sequences}")
        return self

    @property
    def model_path(self) -> str:
        """`model`, under langchain_community's name."""
        return self.model

    @property
    def max_tokens(self) -> int:
        """`max_new_tokens`, under the name of LangChain's hosted models."""
        return self.max_new_tokens

    @property
    def path(self) -> Path:
        """The model's folder."""
        return self._info.path

    def release(self) -> None:
        """Close the engine, once no other object uses it and no response is being generated.

        Using this object again reloads the model.
        """
        with lock:
            claim, self._claim = self._claim, None
            if claim is not None:
                release(claim)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text, including BOS if the model expects it."""
        with self._calling(None, {}) as call:
            return call.model.encode(text)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything besides the prompt that the response depends on."""
        return {
            "model_name": self.model,
            "model_path": str(self._info.path),
            "format": self._info.format_name,
            "settings": api.choose(self._info.generation_config, *self._layers()).to_dict(),
            "max_new_tokens": self.max_new_tokens,
            "stop_sequences": list(self.stop_sequences),
            "seed": self.seed,
            **{name: getattr(self._options, name.removeprefix("kv_")) for name in _LOADING},
        }

    def _say(self, text: str) -> None:
        """Print a line as LangChain's notebook does; chat models print none."""

    def _chunk(self, text: str) -> Any:
        """Wrap streamed text in LangChain's chunk type."""
        raise NotImplementedError

    def _last_chunk(self, call: Call, response: Generation) -> Any:
        """The final chunk, which alone carries the numbers: LangChain sums them over chunks."""
        raise NotImplementedError

    def _stream(
        self,
        prompt: Any,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        with self._calling(stop, kwargs) as call, call.stream(prompt) as stream:
            for text in stream:
                chunk = self._chunk(text)
                if run_manager:
                    run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
            yield self._last_chunk(call, stream.result())

    async def _astream(
        self,
        prompt: Any,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        async with self._acalling(stop, kwargs) as call, call.astream(prompt) as stream:
            async for text in stream:
                chunk = self._chunk(text)
                if run_manager:
                    await run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
            yield self._last_chunk(call, await stream.result())

    def _resolve(self, model: str) -> ModelInfo:
        return loader.resolve(model, self._models)

    @property
    def _models(self) -> Path | None:
        return None if self.models_dir is None else Path(self.models_dir)

    def _layers(self) -> tuple[Any, ...]:
        return self.settings, {"temperature": self.temperature}

    @contextmanager
    def _calling(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Iterator[Call]:
        """Keep the engine loaded during a call; `kwargs` are LangChain's per-call arguments."""
        name, options = self._call_options(stop, kwargs)
        loaded = self._acquire(name)
        try:
            yield Call(name, loaded.model, options)
        finally:
            release(loaded)

    @asynccontextmanager
    async def _acalling(self, stop: list[str] | None, kwargs: dict[str, Any]) -> AsyncIterator[Call]:
        """`_calling` that does not block the event loop while an engine is loaded or closed."""
        name, options = self._call_options(stop, kwargs)
        acquiring = asyncio.ensure_future(run_in_executor(None, self._acquire, name))
        try:
            loaded = await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            acquiring.add_done_callback(_release_unused)
            raise
        try:
            yield Call(name, loaded.model, options)
        finally:
            # Complete even if this task is cancelled again.
            await asyncio.shield(run_in_executor(None, release, loaded))

    def _acquire(self, name: str) -> Loaded:
        if name != self.model:
            return acquire(self._resolve(name), self._options)
        with lock:
            if self._claim is None or self._claim.model.closed:
                self._claim = acquire(self._info, self._options)
            return acquire(self._info, self._options)

    def _call_options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The model's name, and the arguments of `Model.stream`: this object's, overridden by the call's."""
        given = {name: value for name, value in kwargs.items() if value is not None and name != "stream"}
        if tools := [name for name in _TOOLS if name in given]:
            raise UsageError(
                f"{type(self).__name__} does not accept {tools[0]}", "remove it; exl does not support tools"
            )
        name = str(given.pop("model", self.model))
        settings = (*self._layers(), given.pop("settings", None), given.pop("sampling", None))
        limit = given.pop("max_tokens", self.max_new_tokens)
        options = {
            "max_new_tokens": given.pop("max_new_tokens", limit),
            "stop": self.stop_sequences if stop is None else stop,
            "seed": given.pop("seed", self.seed),
            "timeout": given.pop("timeout", self.timeout),
        }
        info = self._info if name == self.model else self._resolve(name)
        return name, {**options, "sampling": api.choose(info.generation_config, *settings, given)}
