"""Tiny random models of every architecture that exllamav2 names, with the variants of their configs.

`make(kind, folder, fmt)` writes a model folder as one finds it on the Hub, `reference(kind, fmt, ids)` computes its
logits: transformers' own class in float32 with eager attention, over the weights that the stored ones stand for. The
config object and the weights come from here, not from the folder, and nothing goes through the product.

    python tests/architectures.py DIR [--only GLOB] [--format gptq]

writes all folders, each with an `expected.npz`: for prompt i `ids{i}`, `logits{i}`, the logits of every position, and
`greedy{i}`, the greedy continuation, with `gaps{i}`, how far behind the second choice was at each of its tokens: 0 from
a near tie of a router on. Where the rotary embedding depends on the length, `steps{i}` holds the logits of each
position as the last of its prefix.

Not to be generated, since transformers has no class of them nor one that computes the same: GemMoE.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import gc
import json
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import quantize
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Config = dict[str, Any]
# From transformers' names and tensors to those stored, and the way back.
Layout = tuple[Callable[[State], State], Callable[[State], State]]
# A pattern of names, the parts' names in it, the whole's name, and the parts' rows.
Pieces = list[tuple[str, tuple[str, ...], str, list[int]]]

FORMATS = ("gptq", "float16", "exl2")
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 128, 4, 2, 32, 288, 2
CONTEXT, WINDOW, ORIGINAL = 256, 32, 64
GROUP = 32
# Shorter and longer than windows and original lengths.
LENGTHS = (24, 100)
NEW_TOKENS = 24
# A router's choice closer than this may fall the other way in float16, and what follows is another text.
ROUTER_GAP = 0.05


@dataclass(frozen=True)
class Kind:
    """One architecture with one set of its config's keys.

    Attributes:
        config: transformers' config, as keyword arguments; `model_type` among them.
        style: 5 or 4, the version of transformers whose config.json is written.
        written: changes to config.json alone; None takes a key out.
        to_stored: from transformers' names and tensors to those of the published checkpoint.
        to_model: the way back.
        act_order: GPTQ rows belong to groups in random order.
        scale: standard deviation of the linear layers' weights.
    """

    config: Config
    style: int = 5
    written: Config = field(default_factory=dict)
    to_stored: Callable[[State], State] = lambda state: state
    to_model: Callable[[State], State] = lambda state: state
    act_order: bool = False
    scale: float = 0.14


# --- config.json ---


def text(model_type: str, **more: Any) -> Config:
    """A small config with the keys that most families share."""
    return {
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **more,
    }


def narrow(model_type: str, **more: Any) -> Config:
    """The same for families whose heads share the hidden size between them."""
    config = text(model_type, num_attention_heads=2, num_key_value_heads=1)
    del config["head_dim"]
    return {**config, **more}


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> Config:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def yarn(**more: Any) -> Config:
    return rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, **more)


def longrope(pairs: int, **more: Any) -> Config:
    factors = {
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.5 * i for i in range(pairs)],
    }
    parameters = rope("longrope", original_max_position_embeddings=ORIGINAL, **factors, **more)
    return {**parameters, "original_max_position_embeddings": ORIGINAL}


def older(config: Config) -> Config:
    """A config.json of transformers 5 as transformers 4 would have written it."""
    config = {key: older(value) if isinstance(value, dict) else value for key, value in config.items()}
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    layer_types = config.pop("layer_types", None)
    if layer_types and config.get("model_type") in ("gemma3_text", "cohere2"):
        config["sliding_window_pattern"] = layer_types.index("full_attention") + 1
    parameters = config.pop("rope_parameters", None)
    if parameters is None:
        return config
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    config["rope_theta"] = parameters.pop("rope_theta")
    if (factor := parameters.pop("partial_rotary_factor", 1.0)) != 1.0:
        config["partial_rotary_factor"] = factor
    if config.get("original_max_position_embeddings"):
        parameters.pop("original_max_position_embeddings", None)
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    return config


# --- names and layouts of published checkpoints ---


def renaming(*pairs: tuple[str, str]) -> dict[str, Callable[[State], State]]:
    """`to_stored` and `to_model` that replace parts of names; each pair is (transformers', published)."""

    def rename(state: State, pairs: dict[str, str]) -> State:
        longest_first = sorted(pairs, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        return {pattern.sub(lambda match: pairs[match[0]], name): tensor for name, tensor in state.items()}

    there, back = dict(pairs), {new: old for old, new in pairs}
    return {"to_stored": lambda s: rename(s, there), "to_model": lambda s: rename(s, back)}


def fuse(state: State, pattern: str, parts: Sequence[str], whole: str, join: Callable[[list[Tensor]], Tensor]) -> State:
    """Replace the tensors `pattern % part` of each place by one `pattern % whole`."""
    fused = dict(state)
    regex = re.compile(r"(.*)" + re.escape(pattern % parts[0]) + r"(\.weight|\.bias)$")
    for name in state:
        if match := regex.match(name):
            names = [match[1] + pattern % part + match[2] for part in parts]
            fused[match[1] + pattern % whole + match[2]] = join([fused.pop(part) for part in names])
    return fused


def split(state: State, pattern: str, parts: Sequence[str], whole: str, cut: Callable[[Tensor], list[Tensor]]) -> State:
    """The way back from `fuse`."""
    apart = {}
    regex = re.compile(r"(.*)" + re.escape(pattern % whole) + r"(\.weight|\.bias)$")
    for name, tensor in state.items():
        if match := regex.match(name):
            apart.update({match[1] + pattern % p + match[2]: t for p, t in zip(parts, cut(tensor), strict=True)})
        else:
            apart[name] = tensor
    return apart


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

INTERNLM2 = (
    ("model.embed_tokens", "model.tok_embeddings"),
    ("lm_head", "output"),
    (".self_attn.", ".attention."),
    (".self_attn.o_proj", ".attention.wo"),
    (".input_layernorm", ".attention_norm"),
    (".post_attention_layernorm", ".ffn_norm"),
    (".mlp.gate_proj", ".feed_forward.w1"),
    (".mlp.down_proj", ".feed_forward.w2"),
    (".mlp.up_proj", ".feed_forward.w3"),
)


def internlm2() -> dict[str, Callable[[State], State]]:
    """Queries, key and value of each key head follow one another in one tensor."""
    names, groups = renaming(*INTERNLM2), HEADS // KV_HEADS

    def join(parts: list[Tensor]) -> Tensor:
        q, k, v = (part.view(KV_HEADS, -1, HEAD_DIM, *part.shape[1:]) for part in parts)
        return torch.cat([q, k, v], 1).flatten(0, 2)

    def cut(whole: Tensor) -> list[Tensor]:
        parts = whole.view(KV_HEADS, groups + 2, HEAD_DIM, *whole.shape[1:])
        return [part.flatten(0, 2) for part in parts.split([groups, 1, 1], 1)]

    return {
        "to_stored": lambda s: names["to_stored"](fuse(s, ".self_attn.%s", QKV, "wqkv", join)),
        "to_model": lambda s: split(names["to_model"](s), ".self_attn.%s", QKV, "wqkv", cut),
    }


def unit_rows(state: State) -> State:
    """The head's rows as Index scales them while it loads; the stored ones are of other lengths."""
    return {**state, "lm_head.weight": torch.nn.functional.normalize(state["lm_head.weight"])}


# --- the kinds ---


def qwen2(**more: Any) -> Config:
    return narrow("qwen2", **{"use_sliding_window": False, **more})


def moe(**more: Any) -> Config:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": GROUP * 2}
    return text("qwen3_moe", **{**experts, "norm_topk_prob": True, **more})


def gemma(model_type: str, **more: Any) -> Config:
    return text(model_type, tie_word_embeddings=True, bos_token_id=0, **more)


def gemma2(**more: Any) -> Config:
    caps = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    return gemma("gemma2", **{**caps, "sliding_window": WINDOW, "num_hidden_layers": 4, **more})


def gemma3(**more: Any) -> Config:
    parameters = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    own = {"query_pre_attn_scalar": 8, "sliding_window": WINDOW, "rope_parameters": parameters}
    return gemma("gemma3_text", **{**own, "num_hidden_layers": 6, **more})


def cohere2(**more: Any) -> Config:
    own = {"tie_word_embeddings": True, "sliding_window": WINDOW, "num_hidden_layers": 4, "logit_scale": 0.25}
    return narrow("cohere2", **{**own, **more})


def phi3(**more: Any) -> Config:
    return narrow("phi3", **{"num_key_value_heads": 2, "original_max_position_embeddings": CONTEXT, **more})


def starcoder2(**more: Any) -> Config:
    return narrow("starcoder2", **{"tie_word_embeddings": True, "sliding_window": None, **more})


def dbrx(**attention: Any) -> Config:
    return {
        "model_type": "dbrx",
        "d_model": HIDDEN,
        "n_heads": 2,
        "n_layers": LAYERS,
        "max_seq_len": CONTEXT,
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attn_config": {"kv_n_heads": 1, "rope_theta": 500000.0, **attention},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
        # The published model's base stands in attn_config, where transformers 5 does not look for it.
        **rope(theta=500000.0),
    }


def gpt2(model_type: str, **more: Any) -> Config:
    return {
        "model_type": model_type,
        "n_embd": HIDDEN,
        "n_head": 2,
        "n_layer": LAYERS,
        "n_positions": CONTEXT,
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }


def granite(**more: Any) -> Config:
    own = {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    }
    return narrow("granite", **{**own, **more})


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


def with_vision(model_type: str, text_config: Config, vision: Config, **more: Any) -> Config:
    tied = text_config["tie_word_embeddings"]
    return {
        "model_type": model_type,
        "text_config": text_config,
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **more,
    }


def llava(model_type: str, text_config: Config, vision: str) -> Config:
    return with_vision(model_type, text_config, {"model_type": vision, **VISION}, image_token_index=3)


def qwen_vl(version: str) -> Config:
    vision = {"depth": 1, "num_heads": 1, "hidden_size": HIDDEN if version == "2" else 32, "intermediate_size": 32}
    vision |= {"embed_dim": 32, "mlp_ratio": 1} if version == "2" else {"out_hidden_size": HIDDEN}
    mrope = {"type": "mrope", "rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]}
    name = f"qwen{version}_vl"
    body = narrow(f"{name}_text", rope_parameters=mrope)
    special = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    return with_vision(name, body, vision, **special)


def flat_vl(version: str) -> Config:
    """Qwen 2's vision models as published: the text model's keys stand at the top, no object of their own."""
    body = older(qwen_vl(version)["text_config"])
    body.pop("model_type")
    vision = {key: value for key, value in qwen_vl(version)["vision_config"].items() if key != "model_type"}
    patches = {"patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"in_chans": 3, **patches}
    if version == "2_5":
        vision |= {"hidden_act": "silu", "fullatt_block_indexes": [0], "window_size": 112, "tokens_per_second": 2}
    scaling = {"type": "mrope", "mrope_section": [4, 6, 6]}
    return {"text_config": None, "vision_config": vision, **body, "rope_theta": 1000000.0, "rope_scaling": scaling}


LLAMA3 = rope(
    "llama3",
    500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)
YARN_KEYS = yarn(attention_factor=1.3, beta_fast=2.0, beta_slow=0.25)
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
SCALES = {"embedding_multiplier": 12.0, "attention_multiplier": HEAD_DIM**-0.5, "logits_scaling": HIDDEN / 16}
DEPTH = {"residual_multiplier": 1.4 / LAYERS**0.5}


def foreign(architecture: str, model_type: str, **more: Any) -> Config:
    """What config.json says of an architecture that transformers leaves to code in the model's repository."""
    return {"architectures": [architecture], "model_type": model_type, **more}


KINDS: dict[str, Kind] = {
    "llama": Kind(text("llama"), act_order=True),
    "llama-older": Kind(text("llama", **rope(theta=500000.0)), style=4),
    "llama-multi-head": Kind(text("llama", num_key_value_heads=HEADS)),
    "llama-one-key-head": Kind(text("llama", num_key_value_heads=1)),
    "llama-tied": Kind(text("llama", tie_word_embeddings=True)),
    "llama-head-128": Kind(text("llama", head_dim=128, num_attention_heads=2, num_key_value_heads=1)),
    "llama-head-of-hidden": Kind(narrow("llama"), style=4),
    "llama-attention-bias": Kind(text("llama", attention_bias=True)),
    "llama-mlp-bias": Kind(text("llama", mlp_bias=True)),
    "llama-gelu": Kind(text("llama", hidden_act="gelu")),
    "llama-gelu-tanh": Kind(text("llama", hidden_act="gelu_pytorch_tanh")),
    "llama-relu": Kind(text("llama", hidden_act="relu")),
    "llama-linear": Kind(text("llama", **rope("linear", factor=4.0))),
    "llama-linear-older": Kind(
        text("llama", **rope("linear", factor=4.0)),
        style=4,
        written={"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama-dynamic-within": Kind(text("llama", **rope("dynamic", factor=4.0))),
    "llama-dynamic": Kind(text("llama", **rope("dynamic", factor=4.0), max_position_embeddings=ORIGINAL)),
    "llama-llama3": Kind(text("llama", **LLAMA3)),
    "llama-llama3-older": Kind(text("llama", **LLAMA3), style=4),
    "llama-yarn": Kind(text("llama", **yarn())),
    "llama-yarn-older": Kind(text("llama", **yarn()), style=4),
    "llama-yarn-keys": Kind(text("llama", **YARN_KEYS)),
    "llama-yarn-mscale": Kind(text("llama", **yarn(mscale=1.0, mscale_all_dim=0.5))),
    "llama-yarn-untruncated": Kind(text("llama", **yarn(truncate=False))),
    "llama-longrope": Kind(text("llama", rope_parameters=longrope(16, factor=4.0)["rope_parameters"])),
    "yi": Kind(
        text("llama"),
        style=4,
        written=foreign("YiForCausalLM", "Yi"),
        **renaming((".input_layernorm", ".ln1"), (".post_attention_layernorm", ".ln2")),
    ),
    "orion": Kind(
        narrow("stablelm", **rope(partial_rotary_factor=1.0)),
        style=4,
        written=foreign(
            "OrionForCausalLM", "orion", rms_norm_eps=1e-5, layer_norm_eps=None, partial_rotary_factor=None
        ),
    ),
    "minicpm": Kind(
        text("granite", **SCALES, **DEPTH),
        style=4,
        written=foreign(
            "MiniCPMForCausalLM",
            "minicpm",
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=16,
            **dict.fromkeys([*SCALES, *DEPTH]),
        ),
    ),
    "index": Kind(
        text("llama"), style=4, written=foreign("IndexForCausalLM", "index", norm_head=1), to_model=unit_rows
    ),
    "internlm2": Kind(text("llama"), style=4, written=foreign("InternLM2ForCausalLM", "internlm2"), **internlm2()),
    "mistral": Kind(text("mistral", sliding_window=WINDOW)),
    "mistral-older": Kind(text("mistral", sliding_window=WINDOW), style=4, act_order=True),
    "mistral-no-window": Kind(text("mistral", sliding_window=None)),
    "mixtral": Kind(narrow("mixtral", sliding_window=WINDOW, num_local_experts=4)),
    "mixtral-older": Kind(narrow("mixtral", sliding_window=WINDOW, num_local_experts=4), style=4),
    "mixtral-no-window": Kind(narrow("mixtral", sliding_window=None, num_local_experts=4)),
    "qwen2": Kind(qwen2()),
    "qwen2-older": Kind(qwen2(), style=4, written={"sliding_window": CONTEXT}),
    "qwen2-tied": Kind(qwen2(tie_word_embeddings=True)),
    "qwen2-window": Kind(qwen2(**WINDOWED)),
    "qwen2-window-older": Kind(qwen2(**WINDOWED), style=4),
    "qwen2-window-everywhere": Kind(qwen2(**{**WINDOWED, "max_window_layers": 0})),
    "qwen2-yarn": Kind(qwen2(**yarn())),
    "qwen2-yarn-older": Kind(
        qwen2(**yarn()),
        style=4,
        written={"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}},
    ),
    "qwen2-yarn-keys": Kind(qwen2(**YARN_KEYS)),
    "qwen2-vl": Kind(qwen_vl("2")),
    "qwen2-vl-older": Kind(qwen_vl("2"), style=4, written=flat_vl("2")),
    "qwen2.5-vl": Kind(qwen_vl("2_5")),
    "qwen2.5-vl-older": Kind(qwen_vl("2_5"), style=4, written=flat_vl("2_5")),
    "qwen3": Kind(text("qwen3")),
    "qwen3-older": Kind(text("qwen3", **rope(theta=1000000.0)), style=4, act_order=True),
    "qwen3-tied": Kind(text("qwen3", tie_word_embeddings=True)),
    "qwen3-head-128": Kind(text("qwen3", head_dim=128)),
    "qwen3-attention-bias": Kind(text("qwen3", attention_bias=True)),
    "qwen3-yarn": Kind(text("qwen3", **yarn())),
    "qwen3-window": Kind(text("qwen3", **WINDOWED)),
    "qwen3-moe": Kind(moe()),
    "qwen3-moe-older": Kind(moe(), style=4),
    "qwen3-moe-plain-topk": Kind(moe(norm_topk_prob=False)),
    "qwen3-moe-dense-layers": Kind(moe(mlp_only_layers=[0])),
    "qwen3-moe-sparse-step": Kind(moe(decoder_sparse_step=2)),
    "qwen3-moe-head-128": Kind(moe(head_dim=128)),
    "gemma": Kind(gemma("gemma")),
    "gemma-older": Kind(gemma("gemma"), style=4, written={"hidden_activation": None, "hidden_act": "gelu"}),
    "gemma2": Kind(gemma2()),
    "gemma2-older": Kind(gemma2(), style=4),
    "gemma2-no-caps": Kind(gemma2(attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3": Kind(with_vision("gemma3", gemma3(), VISION, mm_tokens_per_image=4)),
    "gemma3-older": Kind(with_vision("gemma3", gemma3(), VISION, mm_tokens_per_image=4), style=4),
    "gemma3-other-pattern": Kind(
        with_vision(
            "gemma3",
            gemma3(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
            VISION,
            mm_tokens_per_image=4,
        )
    ),
    "gemma3-text": Kind(gemma3()),
    "gemma3-text-older": Kind(gemma3(), style=4),
    "cohere": Kind(narrow("cohere", tie_word_embeddings=True, logit_scale=0.25)),
    "cohere-head-norm": Kind(narrow("cohere", tie_word_embeddings=True, logit_scale=0.25, use_qk_norm=True), style=4),
    "cohere2": Kind(cohere2()),
    "cohere2-older": Kind(cohere2(), style=4),
    "cohere2-other-pattern": Kind(cohere2(layer_types=["full_attention", "sliding_attention"] * 2)),
    # Without clip_qkv transformers' class fails.
    "dbrx": Kind(dbrx(clip_qkv=8.0), style=4, written={"rope_theta": None}),
    "dbrx-clip": Kind(dbrx(clip_qkv=1.0), style=4, written={"rope_theta": None}),
    "dbrx-5": Kind(dbrx(clip_qkv=1.0)),
    "gpt2": Kind(
        gpt2("gpt2"),
        to_stored=lambda s: {name.removeprefix("transformer."): t for name, t in s.items()},
        to_model=lambda s: {"transformer." + name: t for name, t in s.items()},
    ),
    "gpt2-prefix": Kind(gpt2("gpt2")),
    "gpt2-inner": Kind(gpt2("gpt2", n_inner=192, activation_function="gelu")),
    "gpt2-odd-inner": Kind(gpt2("gpt2", n_inner=96)),
    "llama-odd-sizes": Kind(text("llama", hidden_size=96, intermediate_size=320, head_dim=96)),
    "granite-biases": Kind(granite(attention_bias=True, mlp_bias=True)),
    "gpt-bigcode": Kind(gpt2("gpt_bigcode", multi_query=True)),
    "gpt-bigcode-multi-head": Kind(gpt2("gpt_bigcode", multi_query=False)),
    "granite": Kind(granite()),
    "granite-older": Kind(granite(), style=4),
    "starcoder2": Kind(starcoder2()),
    "starcoder2-window": Kind(starcoder2(sliding_window=WINDOW)),
    "starcoder2-older": Kind(starcoder2(sliding_window=WINDOW), style=4, written={"layer_norm_epsilon": 1e-5}),
    "phi3": Kind(phi3()),
    "phi3-older": Kind(phi3(), style=4),
    "phi3-window": Kind(phi3(sliding_window=WINDOW)),
    "phi3-partial": Kind(phi3(**rope(partial_rotary_factor=0.5), num_key_value_heads=1)),
    "phi3-longrope": Kind(phi3(**longrope(16))),
    "phi3-longrope-older": Kind(phi3(**longrope(16)), style=4),
    "phi3-longrope-partial": Kind(phi3(**longrope(8, partial_rotary_factor=0.5)), style=4),
    "glm4": Kind(text("glm4", attention_bias=True, **rope(partial_rotary_factor=0.5))),
    "glm4-older": Kind(text("glm4", attention_bias=False, **rope(partial_rotary_factor=0.5)), style=4),
    "llava": Kind(llava("llava", text("llama"), "clip_vision_model")),
    "llava-older": Kind(llava("llava", text("llama"), "clip_vision_model"), style=4),
    "pixtral": Kind(llava("llava", text("mistral", sliding_window=None), "pixtral"), style=4),
    "mistral3": Kind(llava("mistral3", text("mistral", sliding_window=None), "pixtral")),
    "mistral3-older": Kind(llava("mistral3", text("mistral", sliding_window=None), "pixtral"), style=4),
}


# --- names and layouts that exllamav2's converter writes ---


def exl2_layout(kind: Kind) -> Layout:
    """How the converter names and splits tensors: by its own table of architectures, fused projections apart."""
    model_type = kind.config["model_type"]
    if kind.written.get("model_type") == "internlm2":
        # Its keymap brings queries, keys, values, embeddings and head to Llama's names.
        names = renaming(*(pair for pair in INTERNLM2 if pair[0].startswith((".input", ".post", ".mlp"))))
        return names["to_stored"], names["to_model"]
    if model_type in ("phi3", "glm4"):
        rows = [HIDDEN, kind.config["num_key_value_heads"] * HEAD_DIM, kind.config["num_key_value_heads"] * HEAD_DIM]
        pieces = [(".self_attn.%s", QKV, "qkv_proj", rows)] if model_type == "phi3" else []
        return _apart([*pieces, (".mlp.%s", GATE_UP, "gate_up_proj", [INNER, INNER])], ())
    if model_type == "dbrx":
        names = (
            (".ffn.experts.mlp.", ".block_sparse_moe.experts."),
            (".ffn.router.layer.", ".block_sparse_moe.gate."),
            (".norm_attn_norm.norm_1.", ".input_layernorm."),
            (".norm_attn_norm.norm_2.", ".post_attention_layernorm."),
            (".norm_attn_norm.attn.", ".self_attn."),
            (".norm_attn_norm.attn.out_proj.", ".self_attn.o_proj."),
            ("transformer.norm_f.", "model.norm."),
            ("transformer.wte.", "model.embed_tokens."),
            ("transformer.blocks.", "model.layers."),
        )
        pieces = [(".self_attn.%s", QKV, "Wqkv", [HIDDEN, HEAD_DIM, HEAD_DIM])]
        there, back = _apart(pieces, names)
        return lambda s: _experts_apart(there(s)), lambda s: back(_experts_together(s))
    if model_type in ("gpt2", "gpt_bigcode"):
        names = (
            (".attn.c_proj.", ".self_attn.o_proj."),
            (".attn.", ".self_attn."),
            ("transformer.ln_f.", "model.norm."),
            ("transformer.wte.", "model.embed_tokens."),
            ("transformer.wpe.", "model.wpe."),
            ("transformer.h.", "model.layers."),
        )
        there, back = _apart([(".self_attn.%s", QKV, "c_attn", [HIDDEN, HEAD_DIM, HEAD_DIM])], names)
        if kind.config.get("multi_query") is False:
            there, back = _heads_apart(names)
        elif model_type == "gpt2":
            there, back = _apart([(".self_attn.%s", QKV, "c_attn", [HIDDEN, HIDDEN, HIDDEN])], names)
        if model_type == "gpt_bigcode":
            return there, back
        return lambda s: there(_transposed(s)), lambda s: _transposed(back(s))
    if kind.to_model is unit_rows:
        return unit_rows, lambda state: state  # it quantizes the head as it has loaded it
    return kind.to_stored, kind.to_model


def _heads_apart(names: Sequence[tuple[str, str]]) -> tuple[Callable[[State], State], Callable[[State], State]]:
    """Each head's query, key and value, which GPTBigCode keeps together, apart."""
    renamed = renaming(*names)

    def cut(whole: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in whole.view(-1, 3, HEAD_DIM, *whole.shape[1:]).unbind(1)]

    def join(parts: list[Tensor]) -> Tensor:
        heads = [part.view(-1, HEAD_DIM, *part.shape[1:]) for part in parts]
        return torch.stack(heads, 1).flatten(0, 2)

    def to_stored(state: State) -> State:
        return split(renamed["to_stored"](state), ".self_attn.%s", QKV, "c_attn", cut)

    def to_model(state: State) -> State:
        return renamed["to_model"](fuse(state, ".self_attn.%s", QKV, "c_attn", join))

    return to_stored, to_model


def _apart(
    pieces: Pieces, names: Sequence[tuple[str, str]]
) -> tuple[Callable[[State], State], Callable[[State], State]]:
    renamed = renaming(*names)

    def to_stored(state: State) -> State:
        state = renamed["to_stored"](state)
        for pattern, parts, whole, rows in pieces:
            state = split(state, pattern, parts, whole, lambda t, rows=rows: list(t.split(rows)))
        return state

    def to_model(state: State) -> State:
        for pattern, parts, whole, _ in pieces:
            state = fuse(state, pattern, parts, whole, torch.cat)
        return renamed["to_model"](state)

    return to_stored, to_model


_EXPERTS = re.compile(r"(.*\.block_sparse_moe\.experts)\.(w1|v1|w2)$")


def _experts_apart(state: State) -> State:
    """DBRX stacks its experts' matrices, the last of them the other way round."""
    apart = {}
    for name, tensor in state.items():
        if not (match := _EXPERTS.match(name)):
            apart[name] = tensor
            continue
        for expert, rows in enumerate(tensor.split(INNER)):
            apart[f"{match[1]}.{expert}.{match[2]}.weight"] = rows.T if match[2] == "w2" else rows
    return apart


def _experts_together(state: State) -> State:
    parts: dict[str, dict[int, Tensor]] = {}
    together = {}
    for name, tensor in state.items():
        if match := re.match(r"(.*\.block_sparse_moe\.experts)\.(\d+)\.(w1|v1|w2)\.weight$", name):
            rows = tensor.T if match[3] == "w2" else tensor
            parts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = rows
        else:
            together[name] = tensor
    return {**together, **{name: torch.cat([p[i] for i in sorted(p)]) for name, p in parts.items()}}


def _transposed(state: State) -> State:
    return {name: tensor.T if _CONV1D.search(name) else tensor for name, tensor in state.items()}


# --- weights ---

_CONV1D = re.compile(r"\bh\.\d+\.(attn|mlp)\.c_\w+\.weight$")
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\..*\.weight$")
_ROUTER = re.compile(r"\.mlp\.gate\.weight$|router\.layer\.weight$")


def _is_quantized(name: str, tensor: Tensor) -> bool:
    if tensor.ndim != 2 or not _IN_LAYER.search(name) or "visual" in name or "vision" in name or "norm" in name:
        return False
    return not re.search(r"\.mlp\.gate\.|block_sparse_moe\.gate\.|router", name)


def gptq(rng: np.random.Generator, weight: NDArray[Any], act_order: bool) -> tuple[State, Tensor]:
    """Round a weight [N, K] to 4 bits: its tensors, and what they stand for."""
    rows = weight.shape[1]
    g_idx = np.arange(rows) // GROUP
    if act_order:
        g_idx = rng.permutation(g_idx)
    groups = [weight.T[g_idx == g] for g in range(rows // GROUP)]
    low = np.minimum([g.min(0) for g in groups], 0)
    high = np.maximum([g.max(0) for g in groups], 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 1, 15).astype(np.int64)
    codes = np.clip(np.rint(weight.T / scales[g_idx]) + zeros[g_idx], 0, 15).astype(np.int64)
    tensors = quantize.pack_gptq(codes, zeros, scales, g_idx, zero_offset=1)
    return tensors, torch.from_numpy(quantize.gptq_weight(codes, zeros, scales, g_idx)).float()


def exl2(rng: np.random.Generator, weight: NDArray[Any], widths: tuple[int, ...]) -> tuple[State, Tensor]:
    """Round a weight [N, K] to groups of those bits: its tensors, and what they stand for."""
    columns, rows = weight.shape
    bits = sorted((widths[i % len(widths)] for i in range(rows // GROUP)), reverse=True)
    perm = rng.permutation(rows)
    packed = weight.T[perm].reshape(-1, GROUP, columns)
    half = 2.0 ** (np.array(bits) - 1)
    wanted = np.abs(packed).max(1) / (half - 1)[:, None]
    scale_max = wanted.max(1).astype(np.float16)
    scale_q = np.clip(np.ceil(np.sqrt(wanted / scale_max[:, None] * 256)) - 1, 0, 15).astype(np.int64)
    scale = (scale_q + 1.0) ** 2 / 256 * scale_max[:, None]
    codes = np.clip(np.rint(packed / scale[:, None]) + half[:, None, None], 0, 2 * half[:, None, None] - 1)
    codes = codes.reshape(rows, columns).astype(np.int64)
    numbers = (codes, scale_q, scale_max, bits, [GROUP] * len(bits), perm)
    return quantize.pack_exl2(*numbers), torch.from_numpy(quantize.exl2_weight(*numbers)).float()


@dataclass
class Weights:
    """What is stored under the published names, and what it stands for under transformers' names."""

    stored: State
    meant: State


@functools.cache
def config_of(kind: str) -> Any:
    """transformers' config object."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(KINDS[kind].config))


def architecture(kind: str) -> str:
    """What its config.json calls it."""
    named: list[str] = KINDS[kind].written.get("architectures", [_class_of(config_of(kind)).__name__])
    return named[0]


def _class_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto._model_mapping[type(config)]


@functools.cache
def _random(kind: str) -> Any:
    """transformers' model in float32 with random weights, which float16 holds exactly."""
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    config = copy.deepcopy(config_of(kind))
    model = _class_of(config)(config)
    model.set_attn_implementation("eager")
    embedding = 0.15 if "gemma" in config.model_type else 0.4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if "norm" in name and bool((parameter == 1).all()):
                values = rng.uniform(0.7, 1.3, shape)
            elif name.endswith("bias"):
                values = rng.normal(0, 0.2, shape)
            elif bool((parameter == 0).all()) and len(shape) == 1:  # Gemma's norms, less 1
                values = rng.uniform(-0.3, 0.3, shape)
            elif bool((parameter == 1).all()):
                values = rng.uniform(0.7, 1.3, shape)
            elif parameter is model.get_input_embeddings().weight:
                values = rng.normal(0, embedding, shape)
            else:
                values = rng.normal(0, 0.3 if _ROUTER.search(name) else KINDS[kind].scale, shape)
            parameter.copy_(torch.from_numpy(values).float().half())
    return model.eval()


@functools.cache
def _published(kind: str) -> State:
    """Its float16 weights under the names that transformers publishes."""
    from transformers.core_model_loading import revert_weight_conversion

    model = _random(kind)
    state = revert_weight_conversion(model, model.state_dict())
    head = model.get_output_embeddings().weight
    if model.config.get_text_config().tie_word_embeddings:
        state = {n: t for n, t in state.items() if not (n.endswith("lm_head.weight") and t.shape == head.shape)}
    return {name: tensor.detach().to(torch.float16) for name, tensor in state.items()}


@functools.cache
def weights(kind: str, fmt: str) -> Weights:
    """The weights of a kind in a format, the same each time."""
    it = KINDS[kind]
    rng = np.random.default_rng(zlib.crc32(f"{kind} {fmt}".encode()))
    to_stored, to_model = (it.to_stored, it.to_model) if fmt != "exl2" else exl2_layout(it)
    state = to_stored(_published(kind))
    if fmt == "exl2":
        # The converter quantizes every head, a tied one as a tensor beside the embeddings.
        prefix = next(("language_model." for n in state if n.startswith("language_model.")), "")
        head = next((n for n in state if n.endswith("lm_head.weight")), prefix + "lm_head.weight")
        embeddings = next(n for n in state if n.endswith("embed_tokens.weight"))
        state = {head: state[embeddings], **state}
    stored: State = {}
    meant: State = {}
    for name, tensor in state.items():
        is_head = fmt == "exl2" and name.endswith("lm_head.weight")
        if fmt == "float16" or not (is_head or _is_quantized(name, tensor)):
            stored[name], meant[name] = tensor, tensor.float()
            continue
        turned = bool(_CONV1D.search(name)) and it.config["model_type"] == "gpt2"
        matrix = (tensor.T if turned else tensor).double().numpy()
        parts, weight = (
            gptq(rng, matrix, it.act_order) if fmt == "gptq" else exl2(rng, matrix, (6,) if is_head else (5, 4))
        )
        layer = name.removesuffix("weight")
        stored.update({layer + part: values for part, values in parts.items()})
        meant[name] = weight.T if turned else weight
    return Weights(stored, to_model(meant))


# --- folders ---


def config_json(kind: str, fmt: str = "gptq") -> Config:
    """What config.json holds."""
    it = KINDS[kind]
    written = json.loads(config_of(kind).to_json_string(use_diff=True))
    written |= {"architectures": [architecture(kind)], "dtype": "float16"}
    written["transformers_version"] = "5.2.0" if it.style == 5 else "4.46.0"
    if it.style == 4:
        written = older(written)
    written.update(it.written)
    written = {key: value for key, value in written.items() if not (key in it.written and value is None)}
    if fmt == "gptq":
        quantization = {"bits": 4, "group_size": GROUP, "desc_act": it.act_order, "sym": False}
        written["quantization_config"] = {"quant_method": "gptq", "checkpoint_format": "gptq", **quantization}
    elif fmt == "exl2":
        written["quantization_config"] = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.5, "head_bits": 6}
    return written


def make(kind: str, folder: Path, fmt: str = "gptq") -> Path:
    """Write a model folder."""
    config = config_of(kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(kind, fmt), indent=1))
    tensors = {name: tensor.contiguous() for name, tensor in weights(kind, fmt).stored.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if hasattr(config, "vision_config"):
        images = {**PREPROCESSOR[config.vision_config.model_type], **_IMAGES}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


_IMAGES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
_PIXELS = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 784, "max_pixels": 7840}
PREPROCESSOR: dict[str, Config] = {
    "siglip_vision_model": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
    | _IMAGES,
    "pixtral": {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 28}, "patch_size": 14}
    | _IMAGES,
    "clip_vision_model": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}} | _IMAGES,
    "qwen2_vl_vision": {"image_processor_type": "Qwen2VLImageProcessor"} | _IMAGES | _PIXELS,
    "qwen2_5_vl_vision": {"image_processor_type": "Qwen2VLImageProcessor"} | _IMAGES | _PIXELS,
}
SPECIAL = ("<s>", "</s>", "<pad>", "<image>", "<video>", "<vision>", "</vision>", "<unk>")


def tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer of VOCAB tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    letters = "etaoinshrdlu"
    merges = [(a, b) for a in letters for b in letters][: VOCAB - len(pieces)]
    pieces += [a + b for a, b in merges]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }


# --- what it must compute ---


@functools.cache
def model(kind: str, fmt: str) -> Any:
    """transformers' own model, float32, eager attention."""
    if fmt == "float16" and KINDS[kind].to_model is Kind.to_model:
        return _random(kind)
    config = copy.deepcopy(config_of(kind))
    state = dict(weights(kind, fmt).meant)
    if fmt == "exl2":
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    loaded, report = _class_of(config).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        raise ValueError(f"{kind} {fmt}: {wrong}")
    return loaded.eval()


@torch.inference_mode()
def reference(kind: str, fmt: str, ids: Sequence[int]) -> Tensor:
    """Float32 logits [len(ids), VOCAB]."""
    it = model(kind, fmt)
    for module in it.modules():
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = 0  # else "dynamic" embeddings remain those of the longest text so far
    logits: Tensor = it(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def by_length(kind: str) -> bool:
    """Whether the rotary embedding of all tokens depends on how many there are.

    Then the logits of a prefix are not those of the same positions in a longer text.
    """
    parameters = getattr(config_of(kind).get_text_config(), "rope_parameters", None) or {}
    return parameters.get("rope_type") in ("dynamic", "longrope")


def step_reference(kind: str, fmt: str, ids: Sequence[int], start: int = 0) -> Tensor:
    """Float32 logits [len(ids) - start, VOCAB] of each position as the last of its prefix, as decoding sees it."""
    if not by_length(kind):
        return reference(kind, fmt, ids)[start:]
    return torch.stack([reference(kind, fmt, ids[: end + 1])[-1] for end in range(start, len(ids))])


def greedy(kind: str, fmt: str, ids: Sequence[int], count: int = NEW_TOKENS) -> tuple[list[int], list[float]]:
    """The most probable continuation, and its `gaps`: see the module's first lines."""
    tokens, gaps = list(ids), []
    for _ in range(count):
        best = reference(kind, fmt, tokens)[-1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    routing = _router_gaps(kind, fmt, tokens)
    if routing is not None:
        # From a near tie of the router on, another text is as right.
        open_from = (routing[len(ids) - 1 : -1] < ROUTER_GAP / 2).int().cummax(0).values
        gaps = [0.0 if is_open else gap for gap, is_open in zip(gaps, open_from.tolist(), strict=True)]
    return tokens[len(ids) :], gaps


@functools.cache
def prompts(kind: str, fmt: str = "gptq") -> tuple[tuple[int, ...], ...]:
    """Token ids of the prompts; those for mixtures of experts leave no choice of experts open."""
    rng = np.random.default_rng(zlib.crc32(kind.encode()) + 1)
    return tuple(tuple(_settled(kind, fmt, [0, *rng.integers(len(SPECIAL), VOCAB, n - 1)], rng)) for n in LENGTHS)


def _settled(kind: str, fmt: str, ids: list[Any], rng: np.random.Generator) -> list[int]:
    ids = [int(i) for i in ids]
    for _ in range(2000):
        gaps = _router_gaps(kind, fmt, ids)
        if gaps is None or bool((gaps >= ROUTER_GAP).all()):
            return ids
        ids[int((gaps < ROUTER_GAP).int().argmax())] = int(rng.integers(len(SPECIAL), VOCAB))
    raise ValueError(f"{kind}: no prompt without a near tie of the router")


def _router_gaps(kind: str, fmt: str, ids: Sequence[int]) -> Tensor | None:
    """The least distance, over all layers, between the last expert chosen and the next, by position."""
    it = model(kind, fmt)
    routers = [m for name, m in it.named_modules() if re.search(r"(\.mlp\.gate|\.router)$", name)]
    if not routers:
        return None
    config = it.config
    chosen = getattr(config, "num_experts_per_tok", None) or config.ffn_config.moe_top_k
    gaps = []

    def look(module: Any, args: tuple[Any, ...], out: Any) -> None:
        weight = module.weight if hasattr(module, "weight") else module.layer.weight
        best = (args[0].reshape(-1, weight.shape[1]) @ weight.T).topk(chosen + 1).values
        gaps.append(best[:, -2] - best[:, -1])

    hooks = [router.register_forward_hook(look) for router in routers]
    try:
        reference(kind, fmt, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(gaps).min(0).values


def expected(kind: str, fmt: str) -> dict[str, NDArray[Any]]:
    """What `expected.npz` holds."""
    arrays: dict[str, NDArray[Any]] = {}
    for i, ids in enumerate(prompts(kind, fmt)):
        tokens, gaps = greedy(kind, fmt, ids)
        arrays[f"ids{i}"] = np.array(ids)
        arrays[f"logits{i}"] = reference(kind, fmt, ids).numpy()
        if by_length(kind):
            arrays[f"steps{i}"] = step_reference(kind, fmt, ids).numpy()
        arrays[f"greedy{i}"], arrays[f"gaps{i}"] = np.array(tokens), np.array(gaps, dtype=np.float32)
    return arrays


def quiet() -> None:
    """Keep transformers from remarking on each model."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def imported() -> None:
    """Have transformers imported and quiet, and keep the garbage collector from looking through it for each model."""
    import transformers.modeling_utils  # noqa: F401

    quiet()
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", help="names of kinds, as a glob")
    parser.add_argument("--format", choices=FORMATS, action="append", help="all three where not given")
    args = parser.parse_args()
    quiet()
    for kind in fnmatch.filter(KINDS, args.only):
        for fmt in args.format or FORMATS:
            folder = make(kind, args.folder / f"{kind}-{fmt}", fmt)
            np.savez_compressed(folder / "expected.npz", **expected(kind, fmt))
            sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
