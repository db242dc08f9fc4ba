"""Read a model's JSON files: untrusted input, with missing keys filled in as transformers would.

transformers takes missing keys from the defaults of its config classes. `_DEFAULTS` copies those that published models
rely on, because importing transformers takes seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from exl_cli.errors import DamagedModelError
from exl_cli.models.rope import extended_length
from exl_cli.system.files import read_file

_GEMMA_2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA_3 = {**_GEMMA_2, "vocab_size": 262208, "max_position_embeddings": 131072}

# By model_type; for multimodal models, that of text_config.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_GEMMA_2,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": _GEMMA_2,
    "gemma3": _GEMMA_3,
    "gemma3_text": _GEMMA_3,
    # The text_config of Llava and Mistral 3 lists only differences from these.
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_bigcode": {"tie_word_embeddings": True, "multi_query": True},
}

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "model_max_length", "max_seq_len", "n_positions")
_LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer")

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
# Layers of the text model only, not those of a vision tower.
_TEXT_LAYER = re.compile(
    r"(?:model\.(?:language_model\.|decoder\.)?layers|language_model\.model\.layers|gpt_neox\.layers"
    r"|(?:transformer\.)?h|transformer\.blocks)\.(\d+)\."
)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """Read a JSON object from a model folder; {} if an optional file is missing.

    Raises:
        DamagedModelError: a required file is missing, or the file is unreadable or not a JSON object.
    """
    if not path.exists():
        if required:
            raise DamagedModelError(f"{path} is missing", "download the model again, including all its JSON files")
        return {}
    require_regular(path)
    try:
        data = read_file(path)
        refuse_pointer(path, data)
        # Windows editors write a byte order mark.
        value = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise DamagedModelError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error
    except RecursionError as error:
        raise DamagedModelError(f"{path} is nested too deeply", "download the file again") from error
    except ValueError as error:
        raise DamagedModelError(f"{path} is not valid JSON: {error}", "download the file again") from error
    if not isinstance(value, dict):
        raise DamagedModelError(f"{path} is not a JSON object", "download the file again")
    return value


def require_regular(path: Path) -> None:
    """Raise DamagedModelError for a pipe or device, which might block or never end."""
    if not path.is_file():
        raise DamagedModelError(f"{path} is not a regular file", "download the file again")


def with_quantization(config: dict[str, Any], read_older: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Add `quantization_config` to a config.json that lacks it.

    Args:
        config: from config.json.
        read_older: reads quantize_config.json, AutoGPTQ's file until 2024; {} if there is none.
    """
    if isinstance(config.get("quantization_config"), dict) or not (older := read_older()):
        return config
    return {**config, "quantization_config": {"quant_method": "gptq", **older}}


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's `quantization_config`; {} if there is none."""
    value = config.get("quantization_config")
    return value if isinstance(value, dict) else {}


def value_of(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Look a key up in config.json, then in its `text_config`, then in the model type's defaults."""
    if key in config:
        return config[key]
    text = _text(config)
    if key in text:
        return text[key]
    # DBRX nests these.
    for part in (config.get("attn_config"), config.get("ffn_config")):
        if isinstance(part, dict) and key in part:
            return part[key]
    return _DEFAULTS.get(str(text.get("model_type", config.get("model_type"))), {}).get(key, default)


def context_length_of(config: Mapping[str, Any]) -> int:
    """The context length that config.json states, in tokens, before RoPE scaling."""
    # Any explicit value takes precedence over the model type's default.
    lengths = [source.get(key) for source in (config, _text(config)) for key in _CONTEXT_KEYS]
    lengths.append(value_of(config, _CONTEXT_KEYS[0]))
    # 2048 is exllamav2's default.
    return next((value for value in lengths if isinstance(value, int) and value > 0), 2048)


def extended_length_of(config: Mapping[str, Any]) -> int:
    """The context length after RoPE scaling, in tokens."""
    length = context_length_of(config)
    return max(extended_length(config, length), extended_length(_text(config), length))


def has_learned_positions(config: Mapping[str, Any]) -> bool:
    """Whether the model has learned position embeddings, which end at its context length."""
    return config.get("model_type") in ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "openai-gpt", "biogpt")


_ROPE_TYPES = {"default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional", "mrope"}


def unknown_rope(config: Mapping[str, Any]) -> str:
    """The RoPE type in config.json if we do not know it; else empty."""
    for source in (config, _text(config)):
        for rope in (source.get("rope_scaling"), source.get("rope_parameters")):
            if not isinstance(rope, dict):
                continue
            # Models with several layer types nest one object per type.
            for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
                kind = part.get("rope_type", part.get("type", "default"))
                if kind not in _ROPE_TYPES if isinstance(kind, str) else kind is not None:
                    return str(kind)
    return ""


def refuse_pointer(path: Path, data: bytes) -> None:
    """Raise DamagedModelError for a Git LFS pointer, as left by a clone without Git LFS."""
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DamagedModelError(
            f"{path} is a Git LFS pointer, not the file itself",
            "run git lfs pull in its folder, or download the model with exl download",
        )


def check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse dimensions that are not positive integers. Null and lists (one value per layer) are left to the engine.

    Raises:
        DamagedModelError: naming the field and its value.
    """
    file = path / "config.json"
    if not isinstance(config.get("text_config", {}), (dict, NoneType)):
        raise DamagedModelError(f"{file}: text_config must be an object", "download the file again")
    for source, place in ((config, ""), (_text(config), "text_config.")):
        if isinstance(value := source.get("sliding_window"), str):
            raise DamagedModelError(
                f"{file}: {place}sliding_window must be a whole number or null, got {_brief(value)}",
                "download the file again",
            )
        for key in _COUNTS:
            value = source.get(key)
            if value is None or isinstance(value, list):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DamagedModelError(
                    f"{file}: {place}{key} must be a positive whole number, got {_brief(value)}",
                    "download the file again",
                )


def check_layers(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that the weights have as many layers as config.json says, plus any multi-token-prediction layers.

    Raises:
        DamagedModelError: with both numbers.
    """
    wanted = next((value for key in _LAYER_KEYS if isinstance(value := value_of(config, key), int)), 0)
    there = max((1 + int(match[1]) for name in names if (match := _TEXT_LAYER.match(name))), default=0)
    if not wanted or not there or config.get("is_encoder_decoder"):
        return
    # DeepSeek V3, GLM 4.5 and others append layers for multi-token prediction (MTP).
    sources = (config, _text(config))
    extra = sum(v for s in sources for k, v in s.items() if ("nextn" in k or "mtp" in k) and isinstance(v, int))
    if there < wanted or there > wanted + max(0, extra):
        raise DamagedModelError(
            f"{path}: the weights have {there:,} layers, but config.json says {wanted:,}",
            "download the model again, or take config.json from its repository",
        )


def in_layer(name: str) -> bool:
    """Whether a tensor belongs to a transformer layer, not to the embeddings, final norm or head."""
    return _IN_LAYER.search(name) is not None


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
