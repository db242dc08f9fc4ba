"""Request bodies of the text APIs: sampler settings under any client's names, and their conversion to requests.

Names come from OpenAI, vLLM, TabbyAPI (common/sampling.py), and SillyTavern, which sends several names for one setting
(public/scripts/textgen-settings.js, createTextGenGenerationData). They are renamed to exl's before validation.
Unsupported settings are refused unless their value turns them off. Fields that are simply unknown are ignored and
listed in `Body.ignored`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import from_json

from exl_cli.api.model import choose
from exl_cli.api.validation import first_fault
from exl_cli.engines.base import Request
from exl_cli.errors import UsageError, brief, first_param, spell
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import FIELDS, Sampling, from_generation_config

# Defaults that OpenAI's clients expect: the raw model distribution.
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "token_repetition_penalty": 1.0}

# Other names of exl's fields.
ALIASES = {
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_length": "min_tokens",
    "sampler_seed": "seed",
    "stopping_strings": "stop",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "custom_token_bans": "banned_tokens",
    "frequency_penalty": "token_frequency_penalty",
    "presence_penalty": "token_presence_penalty",
    "repetition_penalty": "token_repetition_penalty",
    "rep_pen": "token_repetition_penalty",
    "repeat_penalty": "token_repetition_penalty",
    "penalty_range": "token_repetition_range",
    "repetition_range": "token_repetition_range",
    "repetition_penalty_range": "token_repetition_range",
    "rep_pen_range": "token_repetition_range",
    "repeat_last_n": "token_repetition_range",
    "repetition_decay": "token_repetition_decay",
    "typical_p": "typical",
    "dry_penalty_last_n": "dry_range",
    "dynatemp_low": "min_temp",
    "dynatemp_min": "min_temp",
    "dynatemp_high": "max_temp",
    "dynatemp_max": "max_temp",
    "dynatemp_exponent": "temp_exponent",
    "mirostat_mode": "mirostat",
    "add_special_tokens": "add_bos_token",
}

# Values that exl writes differently: (theirs, ours).
_VALUES: dict[str, list[tuple[Any, Any]]] = {
    "top_k": [(-1, 0)],
    "dry_range": [(-1, 0)],
    "mirostat": [(0, False), (2, True)],
}

# Unsupported settings, with the values that turn them off; null always does.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("cfg_scale", "guidance_scale", "smoothing_curve", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("num_beams", "length_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "dynatemp_range"), (0,)),
    **dict.fromkeys(("nsigma", "top_n_sigma"), (0, -1)),
    **dict.fromkeys(("rep_pen_slope", "min_keep"), (0, 1)),
    "adaptive_target": (-0.01, -1),
    "max_tokens_second": (0,),
    "do_sample": (True,),
    **dict.fromkeys(("use_beam_search", "early_stopping", "token_healing", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("grammar", "grammar_string", "guided_grammar", "regex_pattern", "guided_regex"), ("",)),
    **dict.fromkeys(("json_schema", "guided_json", "guided_choice", "structured_outputs"), ({}, [])),
    **dict.fromkeys(("allowed_tokens", "allowed_token_ids", "sampler_order", "samplers", "sampler_priority"), ([], "")),
    **dict.fromkeys(("suffix", "chat_template", "truncate_prompt_tokens"), ("",)),
    **dict.fromkeys(("functions", "documents"), ([],)),
    **dict.fromkeys(("function_call", "audio", "prediction", "web_search_options", "moderation"), ()),
    "modalities": (["text"],),
    "prompt_logprobs": (),
}

# Fields that do not affect the response.
_HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "cache_control", "api_type", "api_server", "cache_prompt",
    "speculative_ngram", "priority", "request_id",
})  # fmt: skip

# In OpenAI's API a bias of -100 bans a token.
_BAN = -100.0
_MOST = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
TokenId = Annotated[int, Field(ge=0, le=_MOST)]
Text = Annotated[str, Field(max_length=4096)]
Texts = Annotated[list[Text], Field(max_length=256)]
_TEXTS = TypeAdapter(Texts)
B = TypeVar("B", bound="Body")


class BodyError(UsageError):
    """An invalid or unsupported body.

    Attributes:
        field: the offending field, or empty.
        code: OpenAI's error code.
    """

    def __init__(self, message: str, hint: str = "", *, field: str = "", code: str = "invalid_value") -> None:
        super().__init__(message, hint)
        self.field, self.code = field, code


class Strict(BaseModel):
    """Part of a body, validated without type coercion."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class Body(Strict):
    """A request body whose fields may have several names."""

    model_config = ConfigDict(extra="forbid")
    _ignored: tuple[str, ...] = PrivateAttr(())
    _sent: dict[str, str] = PrivateAttr({})  # fields to the names that the client sent

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of unknown fields, which were ignored."""
        return self._ignored

    @classmethod
    def parse(cls: type[B], data: bytes | Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> B:
        """Parse and validate a body.

        Args:
            data: what the client sent.
            defaults: values, under exl's names, of fields that it left out.

        Raises:
            BodyError: not a JSON object, or an invalid field.
        """
        try:
            values = from_json(data, allow_inf_nan=False) if isinstance(data, bytes) else dict(data)
        except ValueError as error:
            raise BodyError(f"the body is not valid JSON: {error}", code="invalid_json") from None
        if not isinstance(values, dict):
            raise BodyError("the body is not a JSON object", code="invalid_json")
        if defaults:
            sent, _ = renamed(values, cls.model_fields)
            values |= {name: value for name, value in defaults.items() if name not in sent}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            fault = first_fault(error.errors(include_url=False))
            code = "missing" if fault.is_missing else "invalid_value"
            field = _as_sent(fault.field, values)
            raise BodyError(f"{field} {fault.problem}", field=field, code=code) from None

    @model_validator(mode="wrap")
    @classmethod
    def _rename(cls, data: Any, validate: Any) -> Any:
        values, ignored = renamed(data, cls.model_fields) if isinstance(data, dict) else (data, ())
        body = validate(values)
        body._ignored = ignored
        body._sent = {ALIASES[name]: name for name in data if name in ALIASES} if isinstance(data, dict) else {}
        return body


def _as_sent(field: str, values: Mapping[str, Any]) -> str:
    """A field under the name by which the client sent it."""
    name, dot, rest = field.partition(".")
    sent = name if name in values else next((theirs for theirs in values if ALIASES.get(theirs) == name), name)
    return sent + dot + rest


def renamed(data: Mapping[str, Any], fields: Iterable[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Rename a body's fields to exl's names, dropping nulls; returns the values and the ignored names.

    Args:
        data: the parsed body.
        fields: the fields of this kind of body.

    Raises:
        BodyError: an unsupported setting, or two names of one setting with different values.
    """
    fields, values, ignored = set(fields), dict[str, Any](), list[str]()
    for theirs, value in data.items():
        name = theirs if theirs in fields else ALIASES.get(theirs, theirs)
        if value is None or (name not in fields and theirs in _HARMLESS):
            continue
        if name not in fields:
            if theirs not in _NOT_OFFERED:
                ignored.append(theirs)
            elif value not in _NOT_OFFERED[theirs]:
                hint = "leave it out"
                raise BodyError(f"exl does not support {theirs}", hint, field=theirs, code="unsupported_parameter")
            continue
        value = next((ours for other, ours in _VALUES.get(name, ()) if value == other), value)
        first = values.setdefault(name, value)
        if first is not value and first != value:  # NaN differs from itself
            raise BodyError(
                f"{theirs} contradicts another name of the same setting", "send only one of them", field=theirs
            )
    return {name: value for name, value in values.items() if value is not None}, tuple(ignored)


def _sampling_fields() -> dict[str, Any]:
    """The fields of `Sampling`, all optional; `Sampling` itself checks their ranges."""
    kinds = {name: type(getattr(Sampling(), name)) for name in FIELDS}
    return {name: (kind | None, Field(None, description=FIELDS[name].help)) for name, kind in kinds.items()}


if TYPE_CHECKING:
    SamplingFields = Body
else:
    SamplingFields = create_model("SamplingFields", __base__=Body, **_sampling_fields())


class GenerationBody(SamplingFields):
    """Fields of every request that generates."""

    model: str = Field("", max_length=1024, description="Model name; by default the server's first model.")
    stream: bool = False
    max_tokens: Count | None = Field(None, description="Maximum number of tokens to generate.")
    min_tokens: Count = Field(0, description="Minimum number of tokens before the response may end.")
    n: int = Field(1, ge=1, le=128, description="Number of responses; response i uses seed + i.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed, same text; -1 for a random one.")
    stop: str | list[str | int] = Field([], max_length=256, description="Strings or token ids that end the response.")
    stop_token_ids: list[TokenId] = Field([], max_length=256)
    ignore_eos: bool = Field(False, description="Continue past the end-of-response token.")
    ban_eos_token: bool = Field(False, description="Never generate the end-of-response token.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    banned_tokens: list[TokenId] | str = Field([], max_length=4096, description="Token ids never to generate.")
    banned_strings: Text | Texts = Field([], description="Strings never to generate.")
    dry_sequence_breakers: str | Texts | None = Field(None, description="DRY does not match across these strings.")
    cache_salt: str | None = Field(
        None, max_length=256, description="Share the KV cache only with requests that have the same salt."
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(text for text in _list(self.stop) if isinstance(text, str))

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        info: ModelInfo,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: Sequence[int],
        stops: Iterable[str] = (),
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[Request]:
        """Build engine requests: `n` for each prompt, in order, with seeds seed, seed + 1, …

        Args:
            prompts: token ids of each prompt.
            info, tokenizer: the model's.
            max_new_tokens: one limit per prompt.
            stops: stop strings in addition to the body's.
            logprobs, prompt_logprobs: number of alternatives per token; None for no log-probabilities.

        Raises:
            BodyError, UsageError: an invalid setting.
        """
        sampling, bias = self._sampling(info), self._bias(tokenizer)
        breakers = self.dry_sequence_breakers
        ends = set(self.stop_token_ids) | {id_ for id_ in _list(self.stop) if isinstance(id_, int)}
        seed = secrets.randbits(31) if self.seed in (None, -1) else (self.seed or 0) % 2**63
        return [
            Request(
                ids=ids,
                sampling=sampling,
                max_new_tokens=max(most, 1),
                seed=seed + choice,
                stop_strings=(*self.stops, *stops),
                stop_ids=frozenset(ends | (set() if self.ignore_eos else tokenizer.eos_ids)),
                min_new_tokens=self.min_tokens,
                logit_bias=bias,
                banned_strings=tuple(text for text in _list(self.banned_strings) if text),
                dry_sequence_breakers=None if breakers is None else _breakers(breakers),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                cache_salt=self.cache_salt or "",
            )
            for ids, most in zip(prompts, max_new_tokens, strict=True)
            for choice in range(self.n)
        ]

    def _sampling(self, info: ModelInfo) -> Sampling:
        given = {name: value for name in FIELDS if (value := getattr(self, name)) is not None}
        try:
            return choose({}, {**NEUTRAL, **from_generation_config(info.generation_config)}, given)
        except UsageError as error:
            # Without the hint, which names options of the CLI.
            field = first_param(error.message)
            message = spell(error.message, lambda name: self._sent.get(name, name))
            raise BodyError(message, field=self._sent.get(field, field)) from None

    def _bias(self, tokenizer: Tokenizer) -> dict[int, float]:
        banned = self.banned_tokens
        if isinstance(banned, str):
            banned = [int(id_) for id_ in banned.split(",") if id_.strip().isdecimal()]
        bias = {_token_id(id_): value for id_, value in self.logit_bias.items()}
        bias |= dict.fromkeys([*banned, *(tokenizer.eos_ids if self.ban_eos_token else ())], _BAN)
        bias = {id_: value if value > _BAN else -math.inf for id_, value in bias.items()}
        if strange := [id_ for id_ in bias if id_ >= tokenizer.vocab_size]:
            raise BodyError(
                f"the model has no token {strange[0]}",
                f"use ids up to {tokenizer.vocab_size - 1}",
                field="logit_bias" if str(strange[0]) in self.logit_bias else "banned_tokens",
            )
        return bias


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BodyError(f"logit_bias: {brief(text)!r} is not a token id", field="logit_bias")
    return int(text)


def _list(value: str | Sequence[Any]) -> Sequence[Any]:
    """Wrap a single string in a list."""
    return [value] if isinstance(value, str) else value


def _breakers(value: str | list[str]) -> tuple[str, ...]:
    """Parse DRY's sequence breakers; SillyTavern sends a JSON list as a string, with or without brackets."""
    if isinstance(value, str):
        try:
            text = value if value.lstrip().startswith("[") else f"[{value}]"
            value = _TEXTS.validate_json(text, strict=True)
        except ValidationError as error:
            message = "dry_sequence_breakers is not a list of at most 256 strings of at most 4,096 characters"
            raise BodyError(message, field="dry_sequence_breakers") from error
    return tuple(value)
