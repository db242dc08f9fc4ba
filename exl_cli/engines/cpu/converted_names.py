"""Rename the tensors of EXL2 files back to transformers' names.

exllamav2's converter writes its internal names and layouts: Llama's names for some architectures, fused projections and
stacked experts split up, Conv1D weights transposed to linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

State = dict[str, torch.Tensor]

_GPT2 = {
    "model.embed_tokens.": "transformer.wte.",
    "model.wpe.": "transformer.wpe.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    ".self_attn.o_proj.": ".attn.c_proj.",
    ".self_attn.": ".attn.",
}
_NAMES: dict[str, dict[str, str]] = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "dbrx": {
        "model.embed_tokens.": "transformer.wte.",
        "model.norm.": "transformer.norm_f.",
        "model.layers.": "transformer.blocks.",
        ".input_layernorm.": ".norm_attn_norm.norm_1.",
        ".post_attention_layernorm.": ".norm_attn_norm.norm_2.",
        ".self_attn.o_proj.": ".norm_attn_norm.attn.out_proj.",
        ".self_attn.": ".norm_attn_norm.attn.",
        ".block_sparse_moe.gate.": ".ffn.router.layer.",
        ".block_sparse_moe.experts.": ".ffn.experts.mlp.",
    },
}
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_FUSED: dict[str, dict[str, Sequence[str]]] = {
    "phi3": {"qkv_proj": _QKV, "gate_up_proj": _GATE_UP},
    "glm4": {"gate_up_proj": _GATE_UP},
    "gpt2": {"c_attn": _QKV},
    "gpt_bigcode": {"c_attn": _QKV},
    "dbrx": {"Wqkv": _QKV},
}
_EXPERT = re.compile(r"(.*\.ffn\.experts\.mlp)\.(\d+)\.(w1|v1|w2)\.weight")


def is_transposed(model_type: str, layer: str) -> bool:
    """Whether transformers stores this layer as [in, out] (Conv1D)."""
    return model_type == "gpt2" and layer != "lm_head"


def restore(config: Mapping[str, Any], state: State) -> State:
    """Rename and fuse tensors as transformers expects; those already in its layout stay as they are.

    Args:
        config: config.json.
        state: dequantized tensors by name; modified.
    """
    model_type = str(config.get("model_type"))
    if names := _NAMES.get(model_type):
        pattern = re.compile("|".join(map(re.escape, names)))
        state = {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in state.items()}
    for whole, parts in _FUSED.get(model_type, {}).items():
        for first in [name for name in state if f".{parts[0]}." in name]:
            pieces = [state.pop(first.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            fused = torch.cat(pieces, -1 if is_transposed(model_type, whole) else 0)
            if config.get("multi_query") is False:
                # GPTBigCode interleaves per head: query, key, value.
                heads = torch.stack([piece.view(config["n_head"], -1, *piece.shape[1:]) for piece in pieces], 1)
                fused = heads.flatten(0, 2)
            state[first.replace(f".{parts[0]}.", f".{whole}.")] = fused
    return _stack_experts(state) if model_type == "dbrx" else state


def _stack_experts(state: State) -> State:
    """DBRX concatenates all experts into one matrix each for w1, v1 and w2, the last transposed."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name in list(state):
        if match := _EXPERT.fullmatch(name):
            matrix = state.pop(name)
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = matrix.T if match[3] == "w2" else matrix
    for name, experts in stacks.items():
        state[name] = torch.cat([experts[index] for index in sorted(experts)])
    return state
