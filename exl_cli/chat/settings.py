"""What can be set in a chat: the sampler's fields, and how answers are made and shown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from exl_cli import sampling as samplings
from exl_cli.errors import UsageError
from exl_cli.sampling import FIELDS, PRESETS, Sampling

Overflow = Literal["trim", "stop"]
DEFAULT_NEW_TOKENS = 1024

_DEFAULTS = {entry.name: entry.default for entry in fields(Sampling)}
_BY_FLAG = {info.flag.lstrip("-").replace("-", "_"): name for name, info in FIELDS.items()}


@dataclass(frozen=True)
class Settings:
    """Everything that `/set` and `/preset` change.

    Attributes:
        given: sampler fields that were set by hand.
        preset: a key of `sampling.PRESETS`, or None.
        max_new_tokens: the most tokens of one answer.
        seed: fixes the random choices of the whole conversation; None for new ones each time.
        stop: texts that end an answer, besides the format's own.
        on_overflow: what to do when the context is full.
        thinking: show the model's reasoning.
        markdown: render answers as Markdown, on a terminal.

    Raises:
        UsageError: a value that cannot be.
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
            raise UsageError(f"on_overflow is trim or stop, not {self.on_overflow!r}")
        self.sampling({})

    def sampling(self, generation_config: Mapping[str, Any]) -> Sampling:
        """The sampler's settings for a model with this `generation_config.json`."""
        return samplings.build(self.given, self.preset, generation_config)

    def values(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting by the name that `/set` takes."""
        own = {name: getattr(self, name) for name in ("preset", *_OWN)}
        return {**own, **self.sampling(generation_config).to_dict()}

    def with_value(self, name: str, text: str) -> Settings:
        """These settings with one changed.

        Args:
            name: a field, or the flag that sets it, with or without dashes.
            text: the value as typed; "default" takes back what was set.

        Raises:
            UsageError: no such setting, or no such value.
        """
        key = resolve(name)
        if key == "preset":
            return self.with_preset(None if text in ("default", "none") else text)
        if key in _OWN:
            value = getattr(Settings(), key) if text == "default" else _OWN[key](key, text)
            change: dict[str, Any] = {key: value}
            return replace(self, **change)
        given = {field_: value for field_, value in self.given.items() if field_ != key}
        if text != "default":
            given[key] = _PARSERS[type(_DEFAULTS[key])](key, text)
        return replace(self, given=given)

    def with_preset(self, preset: str | None) -> Settings:
        """These settings with a preset, which counts against what was set by hand before."""
        taken = PRESETS.get(preset or "", {})
        return replace(self, preset=preset, given={k: v for k, v in self.given.items() if k not in taken})

    def to_dict(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """JSON-ready: what was set, and under "sampling" what came of it, for whoever reads the file."""
        return {**asdict(self), "given": dict(self.given), "sampling": self.sampling(generation_config).to_dict()}


def from_dict(value: Mapping[str, Any]) -> Settings:
    """The settings in a session's file; those that are missing or mean nothing here keep their defaults.

    Raises:
        TypeError: a value is of a kind that its setting never has.
    """
    settings = Settings()
    for entry in fields(Settings):
        if entry.name in value:
            item = value[entry.name]
            if not _WRITTEN[entry.name](item):
                raise TypeError(f"{entry.name} of the settings is {json.dumps(item)}"[:200])
            change: dict[str, Any] = {entry.name: tuple(item) if entry.name == "stop" else item}
            try:
                settings = replace(settings, **change)
            except (UsageError, TypeError, ValueError, AttributeError):
                continue
    return settings


def names() -> list[str]:
    """Everything that can be set."""
    return ["preset", *_OWN, *FIELDS]


def examples(name: str) -> list[str]:
    """Values to offer for a setting; empty for an unknown one."""
    if name not in names():
        return []
    if name == "preset":
        return [*PRESETS, "none"]
    if name == "on_overflow":
        return [*get_args(Overflow), "default"]
    switch = name in ("thinking", "markdown") or isinstance(_DEFAULTS.get(name), bool)
    return ["on", "off", "default"] if switch else ["default"]


def resolve(name: str) -> str:
    """The setting that a name or flag means.

    Raises:
        UsageError: none.
    """
    key = name.lower().lstrip("-").replace("-", "_")
    if key in names():
        return key
    if key in _BY_FLAG:
        return _BY_FLAG[key]
    known = [*names(), *_BY_FLAG]
    near = [one for one in known if key and one.startswith(key)] or difflib.get_close_matches(key, known, 1)
    raise UsageError(f"no setting named {name!r}", f"did you mean {near[0]}?" if near else "/set lists them")


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is a whole number, not {text!r}") from None


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise UsageError(f"{name} is a number, not {text!r}")
    return value


def _switch(name: str, text: str) -> bool:
    words = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise UsageError(f"{name} is on or off, not {text!r}")
    return words[text.lower()]


def _seed(name: str, text: str) -> int | None:
    return None if text in ("random", "none") else _integer(name, text)


def _texts(name: str, text: str) -> tuple[str, ...]:
    """Stop strings as typed: one, with \\n for a line break; "none" for none."""
    return () if text == "none" else (text.replace("\\n", "\n"),)


def _word(name: str, text: str) -> str:
    return text


def _whole(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


# What a setting is in a session's file.
_WRITTEN: dict[str, Callable[[Any], bool]] = {
    "given": lambda item: isinstance(item, dict),
    "preset": lambda item: item is None or isinstance(item, str),
    "max_new_tokens": _whole,
    "seed": lambda item: item is None or _whole(item),
    "stop": lambda item: isinstance(item, (list, tuple)) and all(isinstance(text, str) for text in item),
    "on_overflow": lambda item: isinstance(item, str),
    "thinking": lambda item: isinstance(item, bool),
    "markdown": lambda item: isinstance(item, bool),
}
_PARSERS: dict[type, Callable[[str, str], Any]] = {bool: _switch, int: _integer, float: _number}
_OWN: dict[str, Callable[[str, str], Any]] = {
    "max_new_tokens": _integer,
    "seed": _seed,
    "stop": _texts,
    "on_overflow": _word,
    "thinking": _switch,
    "markdown": _switch,
}
