"""Body fields under the names of exl, OpenAI, vLLM, TabbyAPI and SillyTavern."""

from __future__ import annotations

import math

import numpy as np
import pytest
from wireformats import PlainModel, fable

from exl_cli.api.bodies import ALIASES, BodyError
from exl_cli.api.openai import ChatBody, CompletionBody, CompletionJob
from exl_cli.engines.base import Request
from exl_cli.engines.sampling.sampler import Samplers
from exl_cli.sampling import FIELDS, Sampling

# What SillyTavern 1.13 sends to TabbyAPI with its neutral preset (public/scripts/textgen-settings.js).
SILLYTAVERN = {
    "prompt": "Once", "model": "fable-7m", "max_new_tokens": 20, "max_tokens": 20, "temperature": 1, "top_p": 1,
    "typical_p": 1, "typical": 1, "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
    "top_k": 0, "skew": 0, "min_tokens": 0, "add_bos_token": True, "smoothing_factor": 0, "smoothing_curve": 1,
    "dry_allowed_length": 2, "dry_multiplier": 0, "dry_base": 1.75,
    "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]', "dry_penalty_last_n": 0, "max_tokens_second": 0,
    "stopping_strings": ["\nYou:"], "stop": ["\nYou:"], "truncation_length": 1024, "ban_eos_token": False,
    "skip_special_tokens": True, "include_reasoning": True, "top_a": 0, "tfs": 1, "mirostat_mode": 0,
    "mirostat_tau": 5, "mirostat_eta": 0.1, "custom_token_bans": "", "banned_strings": [], "api_type": "tabby",
    "api_server": "http://127.0.0.1:5000", "xtc_threshold": 0.1, "xtc_probability": 0, "nsigma": 0, "top_n_sigma": 0,
    "min_keep": 0, "adaptive_target": -0.01, "adaptive_decay": 0.9, "n": 1, "rep_pen": 1, "rep_pen_range": 0,
    "repetition_decay": 0, "repetition_penalty_range": 0, "temperature_last": True, "speculative_ngram": False,
    "guidance_scale": 1, "negative_prompt": "", "json_schema": {}, "repeat_penalty": 1, "repeat_last_n": 0,
    "n_predict": 20, "num_predict": 20, "num_ctx": 1024, "mirostat": 0, "ignore_eos": False, "rep_pen_slope": 1,
    "stream": True,
}  # fmt: skip

NEUTRAL = Sampling(temperature=1.0, top_k=0, top_p=1.0, token_repetition_penalty=1.0)


@pytest.fixture(scope="module")
def model() -> PlainModel:
    return fable()


def request(model: PlainModel, **fields: object) -> Request:
    return CompletionJob(CompletionBody.parse({"prompt": "Once upon a time", **fields}), model).requests[0]


def test_an_empty_body_gets_the_models_own_distribution(model: PlainModel) -> None:
    asked = request(model)
    assert asked.sampling == NEUTRAL
    assert asked.max_new_tokens == 16
    assert asked.stop_ids == model.tokenizer.eos_ids


def test_the_generation_config_fills_in_missing_fields(model: PlainModel) -> None:
    from dataclasses import replace

    info = replace(model.info, generation_config={"temperature": 0.6, "top_k": 20})
    tuned = replace(model, info=info)
    sampling = request(tuned, top_k=7).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 7, 1.0)


def test_sillytaverns_neutral_preset_is_accepted_and_samples_from_the_models_distribution(model: PlainModel) -> None:
    body = CompletionBody.parse(SILLYTAVERN)
    asked = CompletionJob(body, model).requests[0]
    differ = {name for name, value in asked.sampling.to_dict().items() if value != NEUTRAL.to_dict()[name]}
    # None of these does anything as long as the others are off.
    assert differ <= {"temperature_last", "typical", "tfs", "mirostat_tau", "token_repetition_range"}
    assert asked.stop_strings == ("\nYou:",)
    assert asked.dry_sequence_breakers == ("\n", ":", '"', "*")
    assert set(body.ignored) == {
        "truncation_length",
        "include_reasoning",
        "adaptive_decay",
        "negative_prompt",
        "num_ctx",
    }


@pytest.mark.parametrize("name", FIELDS)
def test_every_sampler_setting_is_accepted_under_exls_name(model: PlainModel, name: str) -> None:
    default = getattr(NEUTRAL, name)
    value = True if default is False else 0.5 if isinstance(default, float) else 24
    value = {"dry_base": 2.0, "skew": 0.5, "min_temp": 0.0}.get(name, value)
    if name == "min_temp":
        assert request(model, min_temp=0.5, max_temp=2.0).sampling.min_temp == 0.5
        return
    asked = request(model, **{name: value})
    assert getattr(asked.sampling, name) == value != default


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [
        ("frequency_penalty", 0.5, "token_frequency_penalty"),
        ("presence_penalty", 0.5, "token_presence_penalty"),
        ("repetition_penalty", 1.2, "token_repetition_penalty"),
        ("rep_pen", 1.2, "token_repetition_penalty"),
        ("repeat_penalty", 1.2, "token_repetition_penalty"),
        ("rep_pen_range", 64, "token_repetition_range"),
        ("repeat_last_n", 64, "token_repetition_range"),
        ("penalty_range", 64, "token_repetition_range"),
        ("repetition_range", 64, "token_repetition_range"),
        ("repetition_penalty_range", 64, "token_repetition_range"),
        ("repetition_decay", 64, "token_repetition_decay"),
        ("typical_p", 0.5, "typical"),
        ("dry_penalty_last_n", 64, "dry_range"),
        ("dynatemp_high", 2.0, "max_temp"),
        ("dynatemp_max", 2.0, "max_temp"),
        ("dynatemp_exponent", 2.0, "temp_exponent"),
    ],
)
def test_others_names_mean_exls(model: PlainModel, theirs: str, value: float, ours: str) -> None:
    assert ALIASES[theirs] == ours
    assert getattr(request(model, **{theirs: value}).sampling, ours) == value


def test_mirostat_by_its_mode(model: PlainModel) -> None:
    assert request(model, mirostat_mode=2).sampling.mirostat
    assert not request(model, mirostat_mode=0, mirostat=0).sampling.mirostat
    with pytest.raises(BodyError, match="mirostat"):
        request(model, mirostat_mode=1)


def test_values_that_turn_a_setting_off_elsewhere(model: PlainModel) -> None:
    asked = request(model, top_k=-1, dry_penalty_last_n=-1)
    assert (asked.sampling.top_k, asked.sampling.dry_range) == (0, 0)


def test_fields_beyond_the_sampler_reach_the_request(model: PlainModel) -> None:
    asked = request(
        model, stop=["a", 7], stop_token_ids=[8], ignore_eos=True, min_tokens=3, banned_strings="boo",
        logit_bias={"5": 1.5, "6": -100}, custom_token_bans="9,10", ban_eos_token=True, cache_salt="s", seed=4,
        dry_sequence_breakers=["x"], max_completion_tokens=9,
    )  # fmt: skip
    assert asked.stop_strings == ("a",)
    assert asked.stop_ids == {7, 8}
    assert (asked.min_new_tokens, asked.max_new_tokens, asked.seed, asked.cache_salt) == (3, 9, 4, "s")
    assert asked.banned_strings == ("boo",)
    banned = {6, 9, 10, *model.tokenizer.eos_ids}
    assert asked.logit_bias == {5: 1.5, **dict.fromkeys(banned, -math.inf)}
    assert asked.dry_sequence_breakers == ("x",)


def test_choices_of_one_body_have_different_seeds(model: PlainModel) -> None:
    body = CompletionBody.parse({"prompt": ["a", "b"], "n": 3, "seed": 7})
    assert [r.seed for r in CompletionJob(body, model).requests] == [7, 8, 9, 7, 8, 9]
    assert request(model, seed=-1).seed != request(model, seed=-1).seed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smoothing_curve", 2),
        ("guidance_scale", 1.5),
        ("no_repeat_ngram_size", 3),
        ("top_n_sigma", 1.0),
        ("epsilon_cutoff", 3e-4),
        ("encoder_repetition_penalty", 1.2),
        ("penalty_alpha", 0.6),
        ("adaptive_target", 0.3),
        ("token_healing", True),
        ("grammar_string", "root ::= 'a'"),
        ("json_schema", {"type": "object"}),
        ("guided_json", {"type": "object"}),
        ("include_stop_str_in_output", True),
        ("suffix", "end"),
        ("best_of", 3),
        ("response_format", {"type": "json_object"}),
        ("use_beam_search", True),
        ("max_tokens_second", 5),
    ],
)
def test_settings_that_exl_has_not_are_refused_by_name(model: PlainModel, name: str, value: object) -> None:
    with pytest.raises(BodyError, match=name) as error:
        request(model, **{name: value})
    assert error.value.field == name
    assert error.value.code in ("unsupported_parameter", "unsupported_value")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": -1},
        {"top_p": 2},
        {"max_tokens": 1.5},
        {"max_tokens": 10**40},
        {"max_tokens": -5},
        {"n": 0},
        {"n": 1000},
        {"seed": "x"},
        {"stop": [None]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 1000}},
        {"logit_bias": {"4096": 1}},
        {"logprobs": 99},
        {"logprobs": True},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [4096]},
        {"prompt": [[]]},
        {"echo": 1},
        {"stream_options": {"include_usage": True}},
        {"repetition_penalty": 1.1, "rep_pen": 1.2},
        {"dry_sequence_breakers": "[1]"},
        {"dry_sequence_breakers": "[" * 100_000},
        {"dry_sequence_breakers": '"a",' * 300 + '"a"'},
        {"banned_strings": "a" * 5000},
        {"max_temp": 0.5, "min_temp": 2},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(model: PlainModel, fields: dict[str, object]) -> None:
    from exl_cli.errors import PromptError, UsageError

    with pytest.raises((UsageError, PromptError)) as error:
        request(model, **fields)
    assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": 5}, "prompt must be a string or a list, got 5"),
        ({"prompt": [-1]}, "prompt.0 must be at least 0, got -1"),
        ({"prompt": "a", "banned_strings": ["b", 5]}, "banned_strings.1 must be a string, got 5"),
        ({"prompt": "a", "max_completion_tokens": 1.5}, "max_completion_tokens must be an integer, got 1.5"),
        ({"prompt": "a", "rep_pen": "x"}, 'rep_pen must be a number, got "x"'),
        ({"prompt": "a", "echo": "yes"}, 'echo must be true or false, got "yes"'),
        ({"prompt": "a", "logit_bias": {"5": 1000}}, "logit_bias.5 must be at most 100, got 1000"),
        ({"prompt": "a", "stream_options": []}, "stream_options must be an object, got a list"),
        ({"messages": []}, "messages must have at least 1 item"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content must be a string or a list, got 5"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.0.content.0.type is missing"),
        (
            {"messages": [{"role": "king", "content": "a"}]},
            'messages.0.role must be "system", "developer", "user", "assistant", "tool" or "function", got "king"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}] * 10_001}]},
            "messages.0.content must have at most 10,000 items",
        ),
    ],
    ids=str,
)
def test_the_field_that_is_wrong_is_named_as_the_client_wrote_it(fields: dict[str, object], said: str) -> None:
    with pytest.raises(BodyError) as error:
        (ChatBody if "messages" in fields else CompletionBody).parse(fields)
    assert str(error.value) == said
    assert error.value.field == said.partition(" ")[0]


def test_a_value_out_of_range_is_reported_under_the_name_that_the_client_sent(model: PlainModel) -> None:
    for name in ("repetition_penalty", "token_repetition_penalty"):
        with pytest.raises(BodyError) as error:
            request(model, **{name: 500})
        assert (str(error.value), error.value.field) == (f"{name} must be between 0.01 and 100, got 500", name)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"1", b"null", b"\xff", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000,
        b'{"temperature": Infinity, "prompt": "a"}', b'{"temperature": 1e999, "prompt": "a"}',
        b'{"seed": ' + b"9" * 10_000 + b', "prompt": "a"}', b"\xef\xbb\xbf{}", b'{"prompt": "a"',
    ],
)  # fmt: skip
def test_bytes_that_are_no_json_object_are_refused(text: bytes) -> None:
    with pytest.raises(BodyError):
        CompletionBody.parse(text)


def test_harmless_fields_are_accepted_and_unknown_ones_reported() -> None:
    body = ChatBody.parse({
        "messages": [{"role": "user", "content": "a", "odd": 1}], "user": "me", "metadata": {"a": "b"}, "store": True,
        "service_tier": "auto", "parallel_tool_calls": False, "verbosity": "low", "temprature": 1, "seed": None,
    })  # fmt: skip
    assert body.ignored == ("verbosity", "temprature")


def outcome(model: PlainModel, **fields: object) -> tuple[object, ...]:
    """What a sampler makes of fixed logits after a text that repeats itself: the candidates, and tokens drawn."""
    text = "One day the red fox ran to the tall tree and then the red fox ran to the tall"
    asked = request(model, prompt=text, seed=1, **fields)
    logits = np.random.default_rng(7).normal(0.0, 3.0, model.tokenizer.vocab_size).astype(np.float32)
    logits[list(asked.ids)] += 6.0
    logits[list(model.tokenizer.eos_ids)] += 12.0
    sampler = Samplers(model.tokenizer, len(logits)).make(asked)
    ids, probs = sampler.distribution(logits, list(asked.ids))
    drawn = [sampler.sample(logits, list(asked.ids)) for _ in range(40)]
    return ids.tolist(), np.round(probs, 6).tolist(), drawn


PENALTY: dict[str, object] = {"rep_pen": 1.5}
DRY: dict[str, object] = {"dry_multiplier": 1.0}
DYNAMIC: dict[str, object] = {"dynatemp_low": 0.5, "dynatemp_high": 2.0}
MIROSTAT: dict[str, object] = {"mirostat_mode": 2, "mirostat_tau": 1.0}
XTC: dict[str, object] = {"xtc_probability": 0.5, "xtc_threshold": 0.02}


@pytest.mark.parametrize(
    ("others", "name", "value"),
    [
        ({}, "temperature", 0.5),
        ({}, "top_p", 0.5),
        ({}, "top_k", 3),
        ({}, "min_p", 0.2),
        ({}, "top_a", 0.5),
        ({}, "tfs", 0.5),
        ({}, "typical_p", 0.5),
        ({}, "skew", 2.0),
        ({}, "smoothing_factor", 0.5),
        ({"temperature": 2.0, "top_p": 0.5}, "temperature_last", True),
        ({}, "repetition_penalty", 1.5),
        ({}, "frequency_penalty", 0.5),
        ({}, "presence_penalty", 0.5),
        (PENALTY, "rep_pen_range", 2),
        ({**PENALTY, "rep_pen_range": 2}, "repetition_decay", 8),
        ({}, "dynatemp_high", 2.0),
        ({"dynatemp_high": 2.0}, "dynatemp_low", 0.5),
        (DYNAMIC, "dynatemp_exponent", 2.0),
        ({}, "dry_multiplier", 1.0),
        ({"dry_multiplier": 0.01}, "dry_base", 3.0),
        (DRY, "dry_allowed_length", 3),
        ({**DRY, "dry_max_ngram": 3}, "dry_penalty_last_n", 4),
        (DRY, "dry_sequence_breakers", '["tall"]'),
        ({}, "mirostat_mode", 2),
        (MIROSTAT, "mirostat_tau", 3.0),
        (MIROSTAT, "mirostat_eta", 0.9),
        ({"xtc_threshold": 0.02}, "xtc_probability", 0.5),
        (XTC, "xtc_threshold", 0.2),
        ({}, "custom_token_bans", "262,263"),
        ({}, "logit_bias", {"300": 20.0}),
        ({}, "ban_eos_token", True),
        ({}, "min_tokens", 5),
    ],
)
def test_a_setting_changes_what_is_chosen(
    model: PlainModel, others: dict[str, object], name: str, value: object
) -> None:
    assert outcome(model, **{**others, name: value}) != outcome(model, **others)
