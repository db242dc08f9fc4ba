"""Build the transformers model from config.json and dequantized weights, and turn failures into readable errors.

transformers does not validate configs: a bad value raises whatever exception comes first. Hence the broad `except`s.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from exl_cli.errors import DamagedModelError, ExlError, UnsupportedModelError, param
from exl_cli.models.config import unknown_rope
from exl_cli.models.info import ModelInfo

_LONGEST_REASON = 300

# Keys not passed on: quantization and remote code, which exl handles, and settings that exl makes itself.
_NOT_OURS = {
    "quantization_config",
    "auto_map",
    "torch_dtype",
    "dtype",
    "return_dict",
    "use_return_dict",
    "output_attentions",
    "output_hidden_states",
}
# Multimodal models that exllamav2 supports; run as text models.
_TEXT_PART_RUNS = {"llava", "mistral3", "qwen2_vl", "qwen2_5_vl"}


def choose_class(info: ModelInfo) -> tuple[Any, Any]:
    """transformers' config and model class for a model.

    Raises:
        UnsupportedModelError: transformers has no such class, or not a text-generation one.
        DamagedModelError: transformers rejects a value in config.json.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = info.config.get("model_type")
    unknown = UnsupportedModelError(
        f"transformers {transformers.__version__} has no class for {info.architecture} (model_type {kind!r})",
        f"update transformers, or run it on a GPU with {param('engine')} exllamav2",
    )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise unknown
    raw = {key: value for key, value in info.config.items() if key not in _NOT_OURS}
    if "text_config" not in CONFIG_MAPPING[kind].sub_configs:
        raw.pop("text_config", None)
    if kind == "dbrx":
        raw = _dbrx(raw)
    try:
        config = transformers.AutoConfig.for_model(**raw)
    except Exception as error:
        raise _at_odds(info, error) from error
    try:
        mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        if kind in _TEXT_PART_RUNS:
            mapping = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return config, mapping[type(config)]
    except KeyError:
        if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise UnsupportedModelError(
                f"{info.architecture} is multimodal; on the CPU, exl only supports text models",
                f"choose a text model, or run its text part on a GPU with {param('engine')} exllamav2",
            ) from None
        raise UnsupportedModelError(
            f"{info.architecture} is not a text-generation model",
            "choose a text-generation model; its architecture usually ends in ForCausalLM",
        ) from None


def _dbrx(raw: dict[str, Any]) -> dict[str, Any]:
    """Add what transformers 5 misses in DBRX's config: the RoPE base inside attn_config, and a null clip_qkv."""
    attention = raw.get("attn_config")
    if not isinstance(attention, dict):
        return raw
    base = {"rope_theta": attention["rope_theta"]} if "rope_theta" in attention else {}
    # torch.clamp rejects None for both bounds.
    clip = math.inf if attention.get("clip_qkv") is None else attention["clip_qkv"]
    return {**base, **raw, "attn_config": {**attention, "clip_qkv": clip}}


def build(info: ModelInfo, config: Any, model_class: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Instantiate the model with its weights, in eval mode.

    Raises:
        DamagedModelError: config.json does not describe a valid model, or the weights do not match it.
    """
    # Before 5.24, Gemma 2 claims to support SDPA, which silently ignores the soft cap.
    soft_cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    attention = "sdpa" if getattr(model_class, "_supports_sdpa", False) and not soft_cap else "eager"
    try:
        _check_sizes(info, config, model_class, state)
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (ExlError, MemoryError, OSError):
        raise
    except Exception as error:
        raise _at_odds(info, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        hint = "take the weights and config.json from the same repository"
        if missing == ["lm_head.weight"]:
            hint = 'if its head is tied to the embeddings, set "tie_word_embeddings": true in config.json'
        raise DamagedModelError(f"{info.path} has no weights for {missing[0]} ({len(missing)} missing)", hint)
    return model.eval()


def _check_sizes(info: ModelInfo, config: Any, model_class: Any, state: dict[str, torch.Tensor]) -> None:
    """Compare tensor sizes on the meta device, in milliseconds, before transformers allocates anything.

    transformers would replace mismatched weights by random ones. Compare element counts, not shapes: it transposes some
    weights while loading.
    """
    with torch.device("meta"):
        wanted = model_class(copy.deepcopy(config)).state_dict()
    for name in sorted(wanted.keys() & state.keys()):
        there, asked = list(state[name].shape), list(wanted[name].shape)
        if math.prod(there) != math.prod(asked):
            raise DamagedModelError(
                f"{info.path}: the weights do not match config.json: {name} is {there}, but should be {asked}",
                "download the model again, or take config.json from its repository",
            )


def _at_odds(info: ModelInfo, error: Exception) -> ExlError:
    if rope := unknown_rope(info.config):
        return DamagedModelError(
            f"{info.path / 'config.json'} names the RoPE type {rope!r}, which transformers does not know",
            "update transformers, or correct rope_type where it is misspelled",
        )
    # huggingface_hub's strict dataclasses wrap the actual error.
    while type(error).__name__.startswith("StrictDataclass") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = _one_line(error)
    if isinstance(error, KeyError):
        known = str(error.args[0]) if error.args else ""
        reason = " ".join(known.split()) if " " in known else f"it does not know {reason}"
    elif "ignore_mismatched_sizes" in reason:
        reason = "the weights have other shapes"
    elif not reason or (not isinstance(error, (ValueError, RuntimeError)) and "ield " not in reason):
        reason = f"{type(error).__name__}: {reason}"
    return DamagedModelError(
        f"{info.path / 'config.json'}: transformers cannot build {info.architecture} from it: {reason}",
        "download the file again, or take it from the original model's repository",
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(" Errors: ")[0].rstrip(".")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
