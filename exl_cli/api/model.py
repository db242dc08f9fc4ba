"""The Python API: `from exl_cli import download, load, Sampling`.

    with load("fable-7m") as model:
        print(model.generate("Once upon a time", seed=1))

Notes that the command line would print, such as the choice of engine, go to the logger "exl_cli".
"""

from __future__ import annotations

import contextlib
import logging
import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.api.streams import AsyncStream, Generation, Stream, is_number
from exl_cli.engines.base import Engine, Request
from exl_cli.engines.response import check_can_fit, check_fits
from exl_cli.errors import PromptError, UsageError, spell
from exl_cli.models.chat_template import Format, load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import CacheType, EngineChoice, LoadOptions, Speculation
from exl_cli.models.prompt import half_character
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import FIELDS, Sampling, build
from exl_cli.system import readings

Messages = Sequence[Mapping[str, Any]]

# Fields of exllamav2's ExLlamaV2Sampler.Settings that affect sampling and that `Sampling` lacks.
_FOREIGN = ("token_bias", "cfg_scale", "post_sampling_hooks", "dry_sequence_breakers", "xtc_ignore_tokens")

_DEFAULTS = Sampling()

_log = logging.getLogger("exl_cli")


class LogObserver:
    """Logs notes while a model loads; a `loader.Observer`."""

    def note(self, message: str) -> None:
        _log.info(spell(message))

    def progress(self, done: int, total: int) -> None:
        """Not logged."""


def load(
    model: str | Path,
    *,
    engine: EngineChoice = "auto",
    max_seq_len: int | None = None,
    cache: CacheType = "fp16",
    gpu_split: Sequence[float] | None = None,
    low_mem: bool = False,
    sequences: int = 1,
    speculate: Speculation = "off",
    draft: str | Path | None = None,
    models_dir: str | Path | None = None,
) -> Model:
    """Load a model.

    Args:
        model: a folder, a downloaded "owner/name[:revision]", or "fable-7m", the built-in model.
        engine: "exllamav2", "cpu", or "auto": exllamav2 if the machine and the model allow it, else the CPU.
        max_seq_len: context to allocate, in tokens; None for 4,096 or the model's context, whichever is less.
        cache: KV cache type on the GPU: "fp16", "q8", "q6" or "q4".
        gpu_split: GiB of weights per GPU; None uses one GPU if the model fits, else several, filled alike.
        low_mem: smaller prefill chunks, for less scratch memory.
        sequences: contexts of that length that the KV cache on the GPU has room for; concurrent generations share it.
        speculate: "ngram" drafts tokens by prompt lookup, on exllamav2.
        draft: a draft model with the same vocabulary, given like `model`; None for none.
        models_dir: the folder of downloaded models; None for `EXL_MODELS_DIR`, else the user's data folder.

    Raises:
        ModelNotFoundError, UnsupportedModelError, DamagedModelError: see `loader.resolve`.
        EngineError, OutOfMemoryError, UsageError: see `loader.load`.
    """
    options = LoadOptions(
        engine=engine,
        max_seq_len=max_seq_len,
        cache=cache,
        gpu_split=tuple(gpu_split) if isinstance(gpu_split, list) else gpu_split,  # type: ignore[arg-type]
        low_mem=low_mem,
        sequences=sequences,
        speculate=speculate,
        draft=None if draft is None else str(draft),
    )
    models = None if models_dir is None else Path(str(models_dir))
    return load_resolved(loader.resolve(str(model), models), loader.with_draft(options, models))


def load_resolved(info: ModelInfo, options: LoadOptions) -> Model:
    """`load`, for a model that is already resolved."""
    tokenizer = Tokenizer(info.path)
    model = Model(info, tokenizer, loader.load(info, tokenizer, options, LogObserver()))
    _log.info("loaded %s (%s) with engine %s", info.name, info.format_name, model.facts["engine"])
    return model


class Model:
    """A loaded model. Close it, or use it in a `with` block, to free its memory.

    Thread-safe; concurrent generations share forward passes if the engine supports it.

    Args:
        info: description of the model.
        tokenizer: its tokenizer.
        engine: the loaded engine, owned by this object from now on.

    Attributes:
        info: description of the model.
        context_length: most tokens of prompt plus response.
    """

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer, engine: Engine) -> None:
        self.info = info
        self.context_length = engine.context_length
        self._tokenizer = tokenizer
        self._engine = EngineThread(engine)
        self._format: Format | None = None

    @property
    def facts(self) -> dict[str, str]:
        """The engine's name, device, attention backend, cache and the like, as strings."""
        return {"engine": self._engine.name, **self._engine.facts}

    def generate(
        self,
        prompt: str | Messages,
        *,
        sampling: Sampling | Mapping[str, Any] | None = None,
        max_new_tokens: int = 150,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> Generation:
        """Generate a complete response. Arguments and errors as for `stream` and `Stream`."""
        with self.stream(
            prompt,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            timeout=timeout,
            **settings,
        ) as stream:
            return stream.result()

    def stream(
        self,
        prompt: str | Messages,
        *,
        sampling: Sampling | Mapping[str, Any] | None = None,
        max_new_tokens: int = 150,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> Stream:
        """Stream a response. `Stream.result` returns all of it with timings.

        Args:
            prompt: text to continue, or messages with "role" and "content", rendered with the model's chat template
                (without one, with `chat_template.PlainFormat`).
            sampling: a `Sampling`, a mapping of some of its fields, or exllamav2's settings object. Fields not given
                come from the model's generation_config.json, else from the defaults of `Sampling`.
            max_new_tokens: most tokens to generate.
            stop: one or more strings that end the response, case-sensitive; not part of the text.
            seed: makes the text reproducible (see `engines.base.Request`); None for a random one.
            timeout: seconds for the complete response, including time in the queue; None for no limit.
            **settings: fields of `Sampling` that override `sampling`.

        Raises:
            PromptError: the prompt is empty, does not fit the context, or the chat template rejects it.
            UsageError: an unknown setting or an invalid value.
            EngineError: the model is closed.
        """
        return Stream(self._engine, self._request(prompt, sampling, max_new_tokens, stop, seed, settings), timeout)

    def astream(
        self,
        prompt: str | Messages,
        *,
        sampling: Sampling | Mapping[str, Any] | None = None,
        max_new_tokens: int = 150,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> AsyncStream:
        """`stream` for asyncio: iterate with `async for`, or `await` its `result()`."""
        return AsyncStream(self._engine, self._request(prompt, sampling, max_new_tokens, stop, seed, settings), timeout)

    def encode(self, prompt: str | Messages) -> list[int]:
        """Token ids of a prompt as `stream` would send it, including BOS and the chat template's tokens.

        Special tokens in a text prompt are recognised. In messages, except the assistant's, they are plain text.

        Raises:
            UsageError: neither text nor messages.
            PromptError: the chat template rejects the messages.
        """
        text, add_special_tokens = self._text(prompt)
        return encode(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def _text(self, prompt: str | Messages) -> tuple[str, bool]:
        """The text to encode, and whether the tokenizer adds special tokens to it."""
        if not isinstance(prompt, str) and not _is_messages(prompt):
            raise UsageError(
                f"a prompt must be text or a list of messages, each with a role, got {reprlib.repr(prompt)}"
            )
        text = prompt if isinstance(prompt, str) else self._rendered(prompt)
        return text, isinstance(prompt, str) or self._chat_format().add_special_tokens

    def _rendered(self, messages: Messages) -> str:
        try:
            text = self._chat_format().render(self._tokenizer.as_text_messages(messages))
        except TypeError as error:
            raise UsageError(str(error), "pass each message's content as text") from None
        if typed := self._tokenizer.hidden(text):
            _log.info("%s in the messages is treated as text, not as a special token", ", ".join(typed))
        return text

    def memory(self) -> list[readings.GpuReading]:
        """Readings of the GPUs in use; empty on the CPU."""
        return [] if self.closed else readings.read_gpus(self._engine.memory())

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine.closed

    def close(self, *, wait: bool = True) -> None:
        """Cancel running generations and free the memory. Idempotent.

        Args:
            wait: return only once the memory is free.
        """
        if not self.closed:
            _log.info("closing %s", self.info.name)
        self._engine.close(wait=wait)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chat_format(self) -> Format:
        if self._format is None:
            self._format = load_format(self.info.path)
        return self._format

    def _request(
        self,
        prompt: str | Messages,
        sampling: Any,
        max_new_tokens: int,
        stop: str | Sequence[str],
        seed: int | None,
        settings: Mapping[str, Any],
    ) -> Request:
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
            if value is None and name == "seed":
                continue
            if not is_number(value) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")
        stops = [stop] if isinstance(stop, str) else [*stop] if isinstance(stop, Iterable) else [stop]
        if not all(isinstance(text, str) for text in stops):
            raise UsageError(f"stop must be a string or a list of strings, got {stop!r}")
        if not isinstance(prompt, str):
            stops += self._chat_format().stops
        text, add_special_tokens = self._text(prompt)
        limits = self.context_length, self.info.extended_length
        return Request(
            ids=encode(self._tokenizer, text, *limits, add_special_tokens=add_special_tokens),
            sampling=choose(self.info.generation_config, sampling, settings),
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(31) if seed is None else seed,
            stop_strings=tuple(stops),
            stop_ids=self._tokenizer.eos_ids,
        )


def _is_messages(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (bytes, bytearray))
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in prompt)
    )


def encode(
    tokenizer: Tokenizer,
    text: str,
    context_length: int | None = None,
    most: int | None = None,
    *,
    add_special_tokens: bool,
) -> list[int]:
    """Encode a prompt and check that it fits the context, if given; see `check_can_fit`.

    Raises:
        PromptError: it contains a lone surrogate, or does not fit.
    """
    if half := half_character(text):
        raise PromptError(f"the prompt contains a lone surrogate, {half}", "remove it")
    if context_length is None:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    check_can_fit(tokenizer.least_tokens(text), context_length, most)
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    check_fits(len(ids), context_length, most)
    return ids


def choose(generation_config: Mapping[str, Any], *layers: Any) -> Sampling:
    """Merge sampler settings from several sources.

    Args:
        generation_config: the model's; supplies fields that no layer sets.
        layers: each a `Sampling`, a mapping of fields, exllamav2's settings object, or None; later ones win.

    Raises:
        UsageError: an unknown setting, an invalid value, or an object without settings.
    """
    fields = {str(name): value for layer in layers for name, value in _fields(layer).items() if value is not None}
    return build({name: _number(name, value) for name, value in fields.items()}, None, generation_config)


def _number(name: str, value: Any) -> Any:
    """Convert a value to its field's type; unknown names are left to `build`."""
    if name not in FIELDS:
        return value
    kind = type(getattr(_DEFAULTS, name))
    if not is_number(value) and not (kind is bool and isinstance(value, bool)):
        raise UsageError(f"{name} must be a number, got {value!r}")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise UsageError(f"{name} must be an integer, got {value!r}")
    with contextlib.suppress(OverflowError):
        return kind(value)
    raise UsageError(f"{name} is out of range")


def _fields(layer: Any) -> dict[str, Any]:
    if layer is None or isinstance(layer, Mapping):
        return dict(layer or {})
    if isinstance(layer, Sampling):
        return layer.to_dict()
    # Recognise exllamav2's class by a field: importing it takes a GPU.
    if not hasattr(layer, "token_repetition_penalty"):
        raise UsageError(f"{type(layer).__name__} has no sampler settings", "pass a Sampling or a dict")
    for name in _FOREIGN:
        value = getattr(layer, name, None)
        if value is not None and not (isinstance(value, list) and not value):
            raise UsageError(f"exl has no sampler setting named {name!r}", "remove it from the settings object")
    return {name: getattr(layer, name) for name in FIELDS if hasattr(layer, name)}
