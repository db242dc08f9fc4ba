"""Sampler settings from Python: from a `Sampling`, a mapping, or exllamav2's own settings object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exl_cli.errors import UsageError
from exl_cli.sampling import FIELDS, Sampling, build

# Fields of exllamav2's ExLlamaV2Sampler.Settings that change the choice of tokens and that `Sampling` does not have.
_FOREIGN = ("token_bias", "cfg_scale", "post_sampling_hooks", "dry_sequence_breakers", "xtc_ignore_tokens")

_DEFAULTS = Sampling()


def choose(generation_config: Mapping[str, Any], *layers: Any) -> Sampling:
    """One `Sampling` from several sources.

    Args:
        generation_config: the model's; it says what the layers do not.
        layers: each a `Sampling`, some of its fields by name, exllamav2's own settings object, or None; later ones win.

    Raises:
        UsageError: an unknown setting, an illegal value, or something that holds no settings.
    """
    fields = {name: value for layer in layers for name, value in _fields(layer).items() if value is not None}
    return build({name: _number(name, value) for name, value in fields.items()}, None, generation_config)


def _number(name: str, value: Any) -> Any:
    """The value in its field's own type; what is not a field is left to `build`."""
    if name not in FIELDS:
        return value
    kind = type(getattr(_DEFAULTS, name))
    if not isinstance(value, (int, float)):
        raise UsageError(f"{name} must be a number, got {value!r}")
    if kind is int and not float(value).is_integer():
        raise UsageError(f"{name} must be a whole number, got {value!r}")
    return kind(value)


def _fields(layer: Any) -> dict[str, Any]:
    """Settings by name."""
    if layer is None:
        return {}
    if isinstance(layer, Sampling):
        return layer.to_dict()
    if isinstance(layer, Mapping):
        return dict(layer)
    # exllamav2's class is known by its fields: importing it takes a GPU.
    if not hasattr(layer, "token_repetition_penalty"):
        raise UsageError(f"{type(layer).__name__} holds no sampler settings", "give a Sampling or a dict")
    for name in _FOREIGN:
        value = getattr(layer, name, None)
        if value is not None and not (isinstance(value, list) and not value):
            raise UsageError(f"exl has no sampler setting named {name!r}", "leave it out of the settings object")
    return {name: getattr(layer, name) for name in FIELDS if hasattr(layer, name)}
