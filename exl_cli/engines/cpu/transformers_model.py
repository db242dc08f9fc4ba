"""From config.json and unpacked weights to transformers' own model; what may be wrong with them is said in words.

transformers raises whatever the first line that meets a strange value happens to raise: hence the wide nets here.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from exl_cli.errors import DamagedModelError, ExlError, UnsupportedModelError
from exl_cli.models.config import unknown_rope
from exl_cli.models.info import ModelInfo

_LONGEST_REASON = 300

# Quantization and foreign code, which exl sees to, and what is decided by how exl calls the model.
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
# Models that read images as well, and that exllamav2 runs: their text part is computed as if it stood alone.
_TEXT_PART_RUNS = {"llava", "mistral3", "qwen2_vl", "qwen2_5_vl"}


def choose_class(info: ModelInfo) -> tuple[Any, Any]:
    """transformers' configuration of a model, and the class to make it of.

    Raises:
        UnsupportedModelError: there is no such class, or not one of a text model.
        DamagedModelError: config.json holds a value that the configuration does not take.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = info.config.get("model_type")
    unknown = UnsupportedModelError(
        f"transformers {transformers.__version__} has no class for {info.architecture} (model_type {kind!r})",
        "update transformers, or run it on a GPU with --engine exllamav2",
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
                f"{info.architecture} reads images as well; on the CPU exl runs pure text models only",
                "choose a text model, or run its text part on a GPU with --engine exllamav2",
            ) from None
        raise UnsupportedModelError(
            f"{info.architecture} is no model that continues a text; exl runs no others",
            "choose a model for text generation, whose architecture ends in ForCausalLM as a rule",
        ) from None


def _dbrx(raw: dict[str, Any]) -> dict[str, Any]:
    """DBRX's config with what transformers 5 does not read in it: the rotary base, and that nothing is clipped."""
    attention = raw.get("attn_config")
    if not isinstance(attention, dict):
        return raw
    base = {"rope_theta": attention["rope_theta"]} if "rope_theta" in attention else {}
    # None of both bounds is an error of torch.clamp.
    clip = math.inf if attention.get("clip_qkv") is None else attention["clip_qkv"]
    return {**base, **raw, "attn_config": {**attention, "clip_qkv": clip}}


def build(info: ModelInfo, config: Any, model_class: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The model with its weights, ready to compute.

    Raises:
        DamagedModelError: config.json describes no model that could be made, or the weights are not those of it.
    """
    # Before 5.24 Gemma 2 claims torch's SDPA, which knows no soft cap and leaves it out.
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
            hint = 'if its embeddings are its output layer too, set "tie_word_embeddings": true in config.json'
        raise DamagedModelError(f"{info.path} has no weights for {missing[0]} ({len(missing)} missing)", hint)
    return model.eval()


def _check_sizes(info: ModelInfo, config: Any, model_class: Any, state: dict[str, torch.Tensor]) -> None:
    """Compare sizes before there is any memory: transformers fills weights that do not fit with random numbers first.

    Shapes of one size are its own affair: some it transposes while loading. Whatever making the model raises, it raises
    here, in milliseconds.
    """
    with torch.device("meta"):
        wanted = model_class(copy.deepcopy(config)).state_dict()
    for name in sorted(wanted.keys() & state.keys()):
        there, asked = list(state[name].shape), list(wanted[name].shape)
        if math.prod(there) != math.prod(asked):
            raise DamagedModelError(
                f"{info.path}: the weights do not fit config.json: {name} is {there}, it asks for {asked}",
                "download the model again, or take config.json from its repository",
            )


def _at_odds(info: ModelInfo, error: Exception) -> ExlError:
    if rope := unknown_rope(info.config):
        return DamagedModelError(
            f"{info.path / 'config.json'} names the rope type {rope!r}, which transformers does not know",
            "update transformers, or correct rope_type where it is misspelled",
        )
    # Its checks of single fields and of their relations wrap what they found in a sentence about themselves.
    while type(error).__name__.startswith("StrictDataclass") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = _one_line(error)
    if isinstance(error, KeyError):
        known = str(error.args[0]) if error.args else ""
        reason = " ".join(known.split()) if " " in known else f"it does not know {reason}"
    elif "ignore_mismatched_sizes" in reason:
        reason = "it asks for weights of other shapes"
    elif not reason or (not isinstance(error, (ValueError, RuntimeError)) and "ield " not in reason):
        reason = f"{type(error).__name__}: {reason}"
    return DamagedModelError(
        f"{info.path / 'config.json'}: transformers cannot make {info.architecture} of it: {reason}",
        "download the file again, or take it from the original model's repository",
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(" Errors: ")[0].rstrip(".")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
