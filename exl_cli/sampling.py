"""Sampler settings: the frozen `Sampling`, its presets, and the precedence of flags, preset and generation config.

Fields have the names and meanings of exllamav2's sampler settings. Each field's metadata holds its range and help line;
flags, validation and documentation are generated from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

from exl_cli.errors import UsageError, did_you_mean, param


@dataclass(frozen=True)
class FieldInfo:
    """A field's flag, help and range.

    Attributes:
        flag: the CLI flag.
        help: one line, including the values that turn the setting off.
        low, high: the range; `low` itself is excluded if `low_open`.
        alias: another flag name, as in llama.cpp.
    """

    flag: str
    help: str
    low: float = 0.0
    high: float = math.inf
    low_open: bool = False
    alias: str = ""

    @property
    def range(self) -> str:
        """The range in words: "0 to 1", "above 0"."""
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g}"
        return f"{low} or more" if self.high == math.inf else f"{low} to {self.high:g}"

    def check(self, name: str, value: float) -> None:
        """Raise UsageError if a value is outside the range."""
        low_ok = value > self.low if self.low_open else value >= self.low
        if not (low_ok and value <= self.high):
            limits = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
            if self.high != math.inf:
                limits = (
                    f"{limits} and at most {self.high:g}"
                    if self.low_open
                    else f"between {self.low:g} and {self.high:g}"
                )
            raise UsageError(f"{param(name)} must be {limits}, got {value:g}")


def _setting(
    default: Any,
    flag: str,
    help: str,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    alias: str = "",
    off: tuple[float, ...] = (),
) -> Any:
    if off:
        values = " and ".join(f"{value:g}" for value in off)
        help = f"{help.removesuffix('.')}; {values} {'is' if len(off) == 1 else 'are'} off."
    return field(default=default, metadata={"info": FieldInfo(flag, help, low, high, low_open, alias)})


@dataclass(frozen=True)
class Sampling:
    """Sampler settings. Defaults are those of LangChain's exllamav2 notebook; 0 is off unless the help says otherwise.

    Applied in exllamav2's order: penalties, DRY, temperature and smoothing, top-k, top-p, top-a, min-p, tail-free,
    typical, mirostat, dynamic or last temperature, XTC, skew, and one draw.

    Raises:
        UsageError: a value outside its range, or two that contradict each other.
    """

    temperature: float = _setting(
        0.85, "--temperature", "Softmax temperature; below 0.01 is greedy.", high=100.0, alias="--temp"
    )
    top_k: int = _setting(50, "--top-k", "Keep the K most likely tokens.", off=(0,))
    top_p: float = _setting(
        0.8, "--top-p", "Keep the most likely tokens up to this total probability.", high=1.0, off=(0, 1)
    )
    min_p: float = _setting(
        0.0, "--min-p", "Drop tokens less likely than P times the most likely one.", high=1.0, off=(0,)
    )
    top_a: float = _setting(
        0.0, "--top-a", "Drop tokens less likely than A times the top probability squared.", high=1.0, off=(0,)
    )
    tfs: float = _setting(
        0.0, "--tfs", "Tail-free sampling: share of the second derivative kept.", high=1.0, off=(0, 1)
    )
    typical: float = _setting(
        0.0, "--typical", "Locally typical sampling: probability mass kept.", high=1.0, off=(0, 1)
    )
    skew: float = _setting(
        0.0, "--skew", "Favour more likely (negative) or less likely (positive) tokens.", low=-10.0, high=10.0, off=(0,)
    )
    temperature_last: bool = _setting(False, "--temperature-last", "Apply the temperature after all filters.")
    token_repetition_penalty: float = _setting(
        1.05,
        "--repetition-penalty",
        "Divide the logits of tokens already seen by this.",
        # A smaller divisor overflows float32, which would make all seen tokens equal.
        low=0.01,
        high=100.0,
        alias="--repeat-penalty",
        off=(1,),
    )
    token_repetition_range: int = _setting(
        -1, "--repetition-range", "How many tokens back penalties look; -1 is the whole context, 0 none.", low=-1
    )
    token_repetition_decay: int = _setting(
        0, "--repetition-decay", "Fade penalties out over this many tokens beyond the range.", off=(0,)
    )
    token_frequency_penalty: float = _setting(
        0.0,
        "--frequency-penalty",
        "Subtract this from a token's logit for each earlier occurrence.",
        low=-100.0,
        high=100.0,
        off=(0,),
    )
    token_presence_penalty: float = _setting(
        0.0,
        "--presence-penalty",
        "Subtract this from the logits of tokens already seen.",
        low=-100.0,
        high=100.0,
        off=(0,),
    )
    smoothing_factor: float = _setting(
        0.0, "--smoothing-factor", "Quadratic smoothing of the logits.", high=100.0, off=(0,)
    )
    min_temp: float = _setting(0.0, "--min-temp", "Dynamic temperature: minimum, at low entropy.", high=100.0)
    max_temp: float = _setting(
        0.0, "--max-temp", "Dynamic temperature: maximum; above --min-temp turns it on.", high=100.0
    )
    temp_exponent: float = _setting(
        1.0, "--temp-exponent", "Dynamic temperature: exponent of the entropy.", low_open=True, high=100.0
    )
    mirostat: bool = _setting(False, "--mirostat", "Mirostat 2: keep the surprise of the text constant.")
    mirostat_tau: float = _setting(
        1.5, "--mirostat-tau", "Mirostat: target surprise (bits).", low_open=True, high=100.0
    )
    mirostat_eta: float = _setting(0.1, "--mirostat-eta", "Mirostat: learning rate.", high=1.0)
    dry_multiplier: float = _setting(
        0.0, "--dry-multiplier", "DRY: strength of the penalty on repeated sequences.", high=100.0, off=(0,)
    )
    dry_base: float = _setting(
        1.75, "--dry-base", "DRY: growth of the penalty with each repeated token.", low=1.0, high=100.0
    )
    dry_allowed_length: int = _setting(
        2, "--dry-allowed-length", "DRY: longest repeat without a penalty (tokens).", low=1
    )
    dry_range: int = _setting(0, "--dry-range", "DRY: how many tokens back to look; 0 is the whole context.")
    dry_max_ngram: int = _setting(20, "--dry-max-ngram", "DRY: longest repeat to consider (tokens).", low=1)
    xtc_probability: float = _setting(
        0.0, "--xtc-probability", "XTC: chance of excluding the top choices.", high=1.0, off=(0,)
    )
    xtc_threshold: float = _setting(0.1, "--xtc-threshold", "XTC: minimum probability of a top choice.", high=1.0)

    def __post_init__(self) -> None:
        for name, info in FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, bool):
                info.check(name, value)
        if self.max_temp < self.min_temp:
            raise UsageError(
                f"{param('max_temp')} ({self.max_temp:g}) is less than {param('min_temp')} ({self.min_temp:g})",
                f"raise {param('max_temp')}, or drop both",
            )
        if 0 < self.dry_range <= self.dry_max_ngram:
            raise UsageError(
                f"{param('dry_range')} ({self.dry_range}) must be greater than {param('dry_max_ngram')} "
                f"({self.dry_max_ngram})",
                f"raise {param('dry_range')}, or set it to 0 for the whole context",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, whatever the seed."""
        return self.top_k == 1 or self.temperature < 0.01

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def brief(self) -> dict[str, Any]:
        """The notebook's four fields plus any non-default ones, as `--verbose` prints them."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in NOTEBOOK_FIELDS or getattr(self, f.name) != f.default
        }


NOTEBOOK_FIELDS = ("temperature", "top_k", "top_p", "token_repetition_penalty")


def _info(f: Field[Any]) -> FieldInfo:
    info: FieldInfo = f.metadata["info"]
    return info


FIELDS: dict[str, FieldInfo] = {f.name: _info(f) for f in fields(Sampling)}

PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {"temperature": 0.85, "top_k": 50, "top_p": 0.8, "token_repetition_penalty": 1.05},
    "greedy": {"temperature": 0.0, "token_repetition_penalty": 1.0},
    "precise": {"temperature": 0.3, "top_k": 40, "top_p": 0.9, "token_repetition_penalty": 1.05},
    "creative": {"temperature": 1.1, "top_k": 0, "top_p": 0.0, "min_p": 0.05, "token_repetition_penalty": 1.05},
}

# Keys of generation_config.json (transformers' GenerationConfig) and the fields they set.
_GENERATION_CONFIG_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical",
    "repetition_penalty": "token_repetition_penalty",
}


def build(
    flags: Mapping[str, Any], preset: str | None = None, generation_config: Mapping[str, Any] | None = None
) -> Sampling:
    """Build settings. Flags win over the preset, then the model's generation config, then the defaults.

    Args:
        flags: field names to values; None counts as not given.
        preset: a key of `PRESETS`; with one, the generation config is ignored.
        generation_config: the model's parsed `generation_config.json`.

    Raises:
        UsageError: an unknown preset or field, or an illegal value.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"no preset named {preset!r}", f"presets: {', '.join(PRESETS)}")
        values.update(PRESETS[preset])
    elif generation_config:
        values.update(from_generation_config(generation_config))
    for name, value in flags.items():
        if name not in FIELDS:
            raise UsageError(
                f"no sampler setting named {name!r}", did_you_mean(name, FIELDS) or "exl run --help lists them"
            )
        if value is not None:
            values[name] = value
    return Sampling(**values)


def unusable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a `generation_config.json` that are ignored for a wrong type or an out-of-range value."""
    odd = {
        theirs: config[theirs]
        for theirs, ours in _GENERATION_CONFIG_NAMES.items()
        if config.get(theirs) is not None and ours not in from_generation_config({theirs: config[theirs]})
    }
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ends):
        odd["eos_token_id"] = config["eos_token_id"]
    if not isinstance(config.get("do_sample"), (bool, type(None))):
        odd["do_sample"] = config["do_sample"]
    return odd


def from_generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields set by a `generation_config.json`. Invalid values are ignored: a bad file must not block a run."""
    values: dict[str, Any] = {}
    for theirs, ours in _GENERATION_CONFIG_NAMES.items():
        value: Any = config.get(theirs)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        try:
            value = int(value) if ours == "top_k" else float(value)
            replace(Sampling(), **{ours: value})
        except (UsageError, ValueError, OverflowError):  # JSON allows NaN, Infinity and integers beyond any float
            continue
        values[ours] = value
    if config.get("do_sample") is False:
        # Greedy through the temperature, not top_k, so a --temperature flag still overrides it.
        values["temperature"] = 0.0
    if values and "token_repetition_penalty" not in values:
        # A model that recommends sampler settings without a penalty means no penalty, not the notebook's 1.05.
        values["token_repetition_penalty"] = 1.0
    return values
