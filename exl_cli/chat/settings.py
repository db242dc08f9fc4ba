"""The settings of a chat: sampler settings, and how answers are generated and shown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from exl_cli import sampling as samplings
from exl_cli.errors import UsageError, did_you_mean
from exl_cli.sampling import FIELDS, PRESETS, Sampling

Overflow = Literal["trim", "stop"]
DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    """The values that `/set` and `/preset` change.

    Attributes:
        given: sampler fields that were set explicitly.
        preset: a key of `PRESETS`; explicit fields override it.
        seed: makes the conversation reproducible; None for a random seed per answer.
        stop: stop strings besides those of the chat format.
        on_overflow: when the context is full, drop the oldest turns ("trim") or reject the message ("stop").

    Raises:
        UsageError: a value out of range.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    seed: int | None = None
    stop: tuple[str, ...] = ()
    on_overflow: Overflow = "trim"
    thinking: bool = True
    markdown: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed must be at least 0, got {self.seed}")
        if self.on_overflow not in get_args(Overflow):
            raise UsageError(f"on_overflow must be trim or stop, got {self.on_overflow!r}")
        self.sampling({})

    def sampling(self, generation_config: Mapping[str, Any]) -> Sampling:
        return samplings.build(self.given, self.preset, generation_config)

    def values(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _OWN}, **self.sampling(generation_config).to_dict()}

    def with_value(self, name: str, text: str) -> Settings:
        """A copy with one setting changed, by its name or flag, to a value as typed; "default" resets it."""
        key = resolve(name)
        if key == "preset":
            return self.with_preset(None if text in ("default", "none") else text)
        value = _DEFAULTS[key] if text == "default" else _parse(key, text)
        if key in _OWN:
            change: dict[str, Any] = {key: value}
            return replace(self, **change)
        given = {other: item for other, item in self.given.items() if other != key}
        return replace(self, given=given if text == "default" else {**given, key: value})

    def with_preset(self, preset: str | None) -> Settings:
        """A copy with a preset. Fields that the preset sets are no longer overridden by earlier explicit values."""
        taken = PRESETS.get(preset or "", {})
        return replace(self, preset=preset, given={k: v for k, v in self.given.items() if k not in taken})

    def to_dict(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """JSON-ready: the settings, and under "sampling" the resulting values, for other readers of the file."""
        return {**asdict(self), "given": dict(self.given), "sampling": self.sampling(generation_config).to_dict()}


# Settings of the chat itself, as opposed to the sampler's.
_OWN = [entry.name for entry in fields(Settings) if entry.name != "given"]
_DEFAULTS = {entry.name: entry.default for kind in (Settings, Sampling) for entry in fields(kind)}
_BY_FLAG = {info.flag.lstrip("-").replace("-", "_"): name for name, info in FIELDS.items()}
_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def from_dict(value: Mapping[str, Any]) -> Settings:
    """Read the settings in a session file. An invalid value leaves the default; a wrong JSON type is a TypeError."""
    settings = Settings()
    for name, hint in get_type_hints(Settings).items():
        if name in value:
            item = value[name]
            if not is_kind(item, hint):
                raise TypeError(f"{name} of the settings is {json.dumps(item)}"[:200])
            change: dict[str, Any] = {name: tuple(item) if name == "stop" else item}
            with contextlib.suppress(UsageError, TypeError, ValueError, AttributeError, OverflowError):
                settings = replace(settings, **change)
    return settings


def is_kind(item: object, hint: Any) -> bool:
    """Whether a JSON value has the type of a type hint. For a Literal any string does."""
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(is_kind(item, option) for option in options)
    if kind is tuple:
        return isinstance(item, (list, tuple)) and all(is_kind(text, str) for text in item)
    if isinstance(item, bool):
        return kind is bool
    kinds: Any = {Literal: str, float: (int, float)}.get(kind, kind)
    return isinstance(item, kinds)


def names() -> list[str]:
    """The names of all settings."""
    return [*_OWN, *FIELDS]


def examples(name: str) -> list[str]:
    """Values to offer as completions for a setting; empty for an unknown one."""
    if name == "preset":
        return [*PRESETS, "none"]
    if name == "on_overflow":
        return [*get_args(Overflow), "default"]
    if isinstance(_DEFAULTS.get(name), bool):
        return ["on", "off", "default"]
    return ["default"] if name in names() else []


def resolve(name: str) -> str:
    """The name of a setting, given its name or flag. UsageError for an unknown one suggests the nearest."""
    key = name.lower().lstrip("-").replace("-", "_")
    if key in names():
        return key
    if key in _BY_FLAG:
        return _BY_FLAG[key]
    known = [*names(), *_BY_FLAG]
    begun = next((other for other in known if key and other.startswith(key)), key)
    raise UsageError(f"no setting named {name!r}", did_you_mean(begun, known) or "/set lists them")


def _parse(name: str, text: str) -> Any:
    """Parse a typed value: on or off, a number, or a text with \\n for line breaks."""
    if name == "on_overflow":
        return text
    if name == "stop":
        return () if text == "none" else (text.replace("\\n", "\n"),)
    if name == "seed" and text in ("random", "none"):
        return None
    kind = int if name == "seed" else type(_DEFAULTS[name])
    if kind is bool:
        if text.lower() not in _SWITCH:
            raise UsageError(f"{name} must be on or off, got {text!r}")
        return _SWITCH[text.lower()]
    try:
        value = int(text) if kind is int else float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise UsageError(f"{name} must be a {'whole number' if kind is int else 'number'}, got {text!r}")
    return value
