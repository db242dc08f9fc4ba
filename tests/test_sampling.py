"""Sampler settings: precedence, ranges, display."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from exl_cli.errors import ExitCode, UsageError
from exl_cli.sampling import FIELDS, PRESETS, Sampling, build, from_generation_config

# The line that the notebook prints.
NOTEBOOK = {"temperature": 0.85, "top_k": 50, "top_p": 0.8, "token_repetition_penalty": 1.05}

# Every field's legal edges and the nearest values beyond them; None where there is no such edge.
TINY = 5e-324
EDGES: dict[str, tuple[float | None, float, float, float | None]] = {
    "temperature": (-TINY, 0.0, 100.0, 100.1),
    "top_k": (-1, 0, 10**9, None),
    "top_p": (-TINY, 0.0, 1.0, 1.0001),
    "min_p": (-TINY, 0.0, 1.0, 1.0001),
    "top_a": (-TINY, 0.0, 1.0, 1.0001),
    "tfs": (-TINY, 0.0, 1.0, 1.0001),
    "typical": (-TINY, 0.0, 1.0, 1.0001),
    "skew": (-10.1, -10.0, 10.0, 10.1),
    "token_repetition_penalty": (0.009, 0.01, 100.0, 100.1),
    "token_repetition_range": (-2, -1, 10**9, None),
    "token_repetition_decay": (-1, 0, 10**9, None),
    "token_frequency_penalty": (-100.1, -100.0, 100.0, 100.1),
    "token_presence_penalty": (-100.1, -100.0, 100.0, 100.1),
    "smoothing_factor": (-TINY, 0.0, 100.0, 100.1),
    "min_temp": (-TINY, 0.0, 100.0, 100.1),
    "max_temp": (-TINY, 0.0, 100.0, 100.1),
    "temp_exponent": (0.0, TINY, 100.0, 100.1),
    "mirostat_tau": (0.0, TINY, 100.0, 100.1),
    "mirostat_eta": (-TINY, 0.0, 1.0, 1.0001),
    "dry_multiplier": (-TINY, 0.0, 100.0, 100.1),
    "dry_base": (0.9999, 1.0, 100.0, 100.1),
    "dry_allowed_length": (0, 1, 10**9, None),
    "dry_range": (-1, 0, 10**9, None),
    "dry_max_ngram": (0, 1, 10**9, None),
    "xtc_probability": (-TINY, 0.0, 1.0, 1.0001),
    "xtc_threshold": (-TINY, 0.0, 1.0, 1.0001),
}
SWITCHES = {"temperature_last", "mirostat"}


def test_defaults_are_the_notebook() -> None:
    assert build({}) == Sampling()
    assert Sampling().brief() == NOTEBOOK
    assert PRESETS["notebook"] == NOTEBOOK


def test_defaults_beyond_the_notebooks_are_off() -> None:
    """Everything the notebook does not set is off, as its library leaves it."""
    off = {"min_p", "top_a", "tfs", "typical", "skew", "smoothing_factor", "min_temp", "max_temp"} | {
        "token_frequency_penalty", "token_presence_penalty", "dry_multiplier", "xtc_probability",
    }  # fmt: skip
    assert {name: getattr(Sampling(), name) for name in off} == dict.fromkeys(off, 0.0)
    assert not any(getattr(Sampling(), name) for name in SWITCHES)


# --- precedence


def test_flags_come_before_the_preset_and_the_preset_before_the_model() -> None:
    model = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.02}
    assert build({}, None, model).temperature == 0.6
    assert build({}, "precise", model).temperature == 0.3
    assert build({"temperature": 0.5}, "precise", model).temperature == 0.5
    assert build({"temperature": 0.5}, None, model).top_p == 0.95


def test_a_preset_replaces_the_model_rather_than_mixing_with_it() -> None:
    assert build({}, "precise", {"min_p": 0.02}) == Sampling(**PRESETS["precise"])


def test_what_the_model_leaves_open_is_the_notebook() -> None:
    assert build({}, None, {"temperature": 0.6}) == Sampling(temperature=0.6, token_repetition_penalty=1.0)
    assert build({}, None, {}) == build({}, None, {"bos_token_id": 0, "eos_token_id": 2}) == Sampling()


def test_flags_not_given_are_none() -> None:
    assert build(dict.fromkeys(FIELDS), None, {"temperature": 0.6}).temperature == 0.6


def test_a_flag_may_be_zero_or_false() -> None:
    sampling = build({"temperature": 0.0, "top_k": 0, "mirostat": False}, "precise")
    assert (sampling.temperature, sampling.top_k, sampling.mirostat) == (0.0, 0, False)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_legal(preset: str) -> None:
    assert {name: getattr(build({}, preset), name) for name in PRESETS[preset]} == PRESETS[preset]


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="'hot'") as error:
        build({}, "hot")
    assert all(name in error.value.hint for name in PRESETS)


def test_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="'temprature'") as error:
        build({"temprature": None})
    assert error.value.hint == "did you mean temperature?"
    with pytest.raises(UsageError) as error:
        build({"zzz": 1})
    assert error.value.hint == "exl run --help lists them"


# --- ranges


def test_every_field_has_its_edges_tested() -> None:
    assert set(EDGES) | SWITCHES == set(FIELDS) == {f.name for f in fields(Sampling)}


@pytest.mark.parametrize("name", EDGES)
def test_range_limits_are_inclusive(name: str) -> None:
    below, low, high, above = EDGES[name]
    # The larger of two fields that bound each other goes along.
    company: dict[str, Any] = {"max_temp": 100.0} if name == "min_temp" else {}
    for value in (low, high):
        assert getattr(Sampling(**{**company, name: value}), name) == value
    for value in (below, above, math.nan, -math.inf):
        if value is not None:
            with pytest.raises(UsageError, match=rf"^{name} must be (at least|above|between) ") as error:
                Sampling(**{**company, name: value})
            assert error.value.exit_code == ExitCode.USAGE


def test_dynamic_temperature_must_not_be_upside_down() -> None:
    with pytest.raises(UsageError, match=r"max_temp \(0\.5\) is less than min_temp \(1\)"):
        Sampling(min_temp=1.0, max_temp=0.5)
    with pytest.raises(UsageError, match=r"max_temp \(0\) is less than min_temp \(0\.5\)"):
        Sampling(min_temp=0.5)
    assert Sampling(min_temp=1.0, max_temp=1.0).max_temp == 1.0


def test_dry_range_must_hold_its_longest_repeat() -> None:
    with pytest.raises(UsageError, match=r"dry_range \(20\) must be greater than dry_max_ngram \(20\)"):
        Sampling(dry_range=20)
    assert Sampling(dry_range=21).dry_range == 21
    assert Sampling(dry_range=0).dry_range == 0


def test_flags_are_unambiguous() -> None:
    flags = [info.flag for info in FIELDS.values()]
    assert len(set(flags)) == len(flags)
    assert all(
        flag.startswith("--") and info.help.endswith(".") for flag, info in zip(flags, FIELDS.values(), strict=True)
    )


# --- generation_config.json


def test_generation_config_names_are_translated() -> None:
    config = {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2,
    }  # fmt: skip
    assert from_generation_config(config) == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "typical": 0.9, "token_repetition_penalty": 1.2,
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, "0.7", True, [0.7], {}, -1, 1e9, math.nan, math.inf, 10**400])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "typical_p", "repetition_penalty"])
def test_malformed_values_are_ignored(name: str, value: Any) -> None:
    assert from_generation_config({name: value, "top_k": 7}) == {"top_k": 7, "token_repetition_penalty": 1.0}


@pytest.mark.parametrize("value", [None, "40", True, [40], -1, math.nan, math.inf])
def test_malformed_top_k_is_ignored(value: Any) -> None:
    assert from_generation_config({"top_k": value}) == {}


def test_json_as_python_reads_it() -> None:
    config = json.loads('{"temperature": 1, "top_k": 40.0, "top_p": Infinity, "eos_token_id": [1, 2], "min_p": NaN}')
    values = from_generation_config(config)
    assert values == {"temperature": 1.0, "top_k": 40, "token_repetition_penalty": 1.0}
    assert isinstance(values["temperature"], float)
    assert isinstance(values["top_k"], int)


def test_do_sample_false_is_greedy_until_a_flag_sets_a_temperature() -> None:
    config = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}
    assert build({}, None, config).greedy
    assert build({}, None, config).token_repetition_penalty == 1.1
    assert build({}, None, {"do_sample": False}).token_repetition_penalty == 1.0
    assert not build({"temperature": 0.7}, None, config).greedy


@pytest.mark.parametrize("value", [True, None, 0, "false"])
def test_only_a_plain_false_turns_sampling_off(value: Any) -> None:
    assert not build({}, None, {"do_sample": value, "temperature": 0.6}).greedy


# --- the value itself


@pytest.mark.parametrize(
    ("changes", "greedy"),
    [
        ({}, False),
        ({"top_k": 1}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0099}, True),
        ({"temperature": 0.01}, False),
        ({"temperature": 0.0, "temperature_last": True}, True),
    ],
)
def test_greedy(changes: dict[str, Any], greedy: bool) -> None:
    assert Sampling(**changes).greedy is greedy


def test_brief_adds_non_default_fields() -> None:
    assert Sampling(min_p=0.1, mirostat=True).brief() == {**NOTEBOOK, "min_p": 0.1, "mirostat": True}
    assert Sampling(temperature=1.0).brief() == {**NOTEBOOK, "temperature": 1.0}


def test_to_dict_survives_json() -> None:
    sampling = Sampling(mirostat=True, dry_multiplier=0.8, top_k=0)
    assert Sampling(**json.loads(json.dumps(sampling.to_dict(), allow_nan=False))) == sampling
    assert list(sampling.to_dict()) == list(FIELDS)


def test_frozen_and_hashable() -> None:
    sampling = Sampling()
    with pytest.raises(FrozenInstanceError):
        sampling.temperature = 1.0  # type: ignore[misc]
    assert len({sampling, Sampling(), Sampling(top_k=3)}) == 2
