"""The architecture table against transformers, through a plain forward pass that uses nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import architectures
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from exl_cli.errors import UnsupportedModelError
from exl_cli.models.architecture import Architecture, llama_name, read
from exl_cli.models.formats.headers import TensorHeader
from exl_cli.models.info import ModelInfo
from exl_cli.models.rope import Rope

REFUSED = ("dbrx", "dbrx-clip", "dbrx-5", "llama-relu")


@pytest.fixture(scope="module", autouse=True)
def _transformers() -> None:
    architectures.imported()


def described(kind: str) -> ModelInfo:
    """What would be known of its float16 folder."""
    tensors = {
        name: TensorHeader(name, "F16", tuple(tensor.shape), 2 * tensor.numel(), Path(kind))
        for name, tensor in architectures.weights(kind, "float16").stored.items()
    }
    raw = architectures.config_json(kind, "float16")
    name, longest = architectures.architecture(kind), architectures.CONTEXT
    return ModelInfo(kind, Path(kind), "float", name, 1, 16.0, longest, 1, tensors, config=raw)


@pytest.mark.parametrize("kind", [kind for kind in architectures.KINDS if kind not in REFUSED])
def test_what_is_read_of_config_json_gives_transformers_logits(kind: str) -> None:
    architecture = read(described(kind))
    weights = matrices(kind, architecture)
    short, long = architectures.prompts(kind, "float16")
    for ids in (short, long) if architecture.rope_switches(len(long)) else (long,):
        expected = architectures.reference(kind, "float16", ids)
        error = torch.linalg.vector_norm(logits(architecture, weights, ids) - expected)
        # gelu and its tanh form are one to the table.
        assert float(error / torch.linalg.vector_norm(expected)) <= 1e-3


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_kernel_computes_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=architectures.architecture(kind)):
        read(described(kind))


def matrices(kind: str, architecture: Architecture) -> dict[str, Tensor]:
    """Weights by Llama's names, [out, in]."""
    weights = {}
    for stored, tensor in architectures.weights(kind, "float16").stored.items():
        name, tensor = llama_name(stored, architecture), tensor.float()
        if name is None:
            continue
        if architecture.transposed and tensor.ndim == 2 and ".layers." in name:
            tensor = tensor.T
        layer, _, part = name.rpartition(".")
        whole = next((fused for fused in architecture.fused if layer.endswith(fused.name)), None)
        for target, spans in whole.parts if whole else ():
            outputs = [index for span in spans for index in span]
            weights[f"{layer.removesuffix(whole.name)}{target}.{part}"] = tensor[outputs]
        if whole is None:
            weights[name] = tensor
    return weights


def logits(it: Architecture, weights: dict[str, Tensor], ids: Sequence[int]) -> Tensor:
    """Float32 logits [len(ids), vocabulary]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str, kind: str = it.norm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + it.norm_eps)
        return scaled * (weights[f"{name}.weight"] + it.norm_offset) + weights.get(f"{name}.bias", 0)

    def mlp(x: Tensor, prefix: str) -> Tensor:
        act = functional.silu if it.activation == "silu" else lambda y: functional.gelu(y, approximate="tanh")
        up = linear(x, prefix + "up_proj")
        return linear(act(linear(x, prefix + "gate_proj")) * up if it.gated else act(up), prefix + "down_proj")

    def feed(x: Tensor, layer: int) -> Tensor:
        prefix, experts = f"model.layers.{layer}.mlp.", it.experts
        if experts is None or layer in experts.dense:
            return mlp(x, prefix)
        shares, chosen = linear(x, prefix + "gate").softmax(-1).topk(experts.per_token)
        shares = shares / shares.sum(-1, keepdim=True) if experts.normalized else shares
        each = torch.stack([mlp(x, f"{prefix}experts.{index}.") for index in range(experts.count)], 1)
        return (each.gather(1, chosen[..., None].expand(-1, -1, it.hidden)) * shares[..., None]).sum(1)

    def attend(x: Tensor, layer: int) -> Tensor:
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (linear(x, f"{prefix}{name}_proj").view(len(ids), -1, it.head_dim) for name in "qkv")
        if it.head_norm:
            q, k = norm(q, prefix + "q_norm", it.head_norm), norm(k, prefix + "k_norm", it.head_norm)
        if (rope := it.ropes[layer]) and it.rotary != "none":
            q, k = turned(q, rope, it.rotary), turned(k, rope, it.rotary)
        k, v = (part.repeat_interleave(it.heads // it.kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * it.attention_scale
        if it.attention_softcap:
            scores = it.attention_softcap * torch.tanh(scores / it.attention_softcap)
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        hidden = (distance < 0) | (distance >= (it.windows[layer] or math.inf))
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
        return linear(attended.flatten(1), prefix + "o_proj")

    x = weights["model.embed_tokens.weight"][list(ids)] * it.embedding_scale
    if it.learned_positions:
        x = x + weights["model.wpe.weight"][: len(ids)]
    for layer in range(it.layers):
        before, after, before_mlp, after_mlp = (f"model.layers.{layer}.{name}" if name else "" for name in it.norms)
        normed = norm(x, before)
        added = attend(normed, layer)
        added = norm(added, after) if after else added
        if it.parallel:
            x = x + (added + feed(normed, layer)) * it.residual_scale
            continue
        x = x + added * it.residual_scale
        added = feed(norm(x, before_mlp), layer)
        x = x + (norm(added, after_mlp) if after_mlp else added) * it.residual_scale
    head = weights["model.embed_tokens.weight" if it.tied else "lm_head.weight"]
    head = functional.normalize(head) if it.normalized_head else head
    out = functional.linear(norm(x, "model.norm"), head, weights.get("lm_head.bias")) * it.logit_scale
    return it.logit_softcap * torch.tanh(out / it.logit_softcap) if it.logit_softcap else out


def turned(x: Tensor, rope: Rope, style: str) -> Tensor:
    """Queries or keys [tokens, heads, head_dim] at the positions from 0 on."""
    angles = torch.tensor(rope.frequencies(len(x)))
    angles = torch.arange(len(x))[:, None, None] * angles
    sine, cosine = angles.sin() * rope.attention_factor, angles.cos() * rope.attention_factor
    part, rest = x[..., : rope.dim], x[..., rope.dim :]
    a, b = part.chunk(2, -1) if style == "halves" else (part[..., ::2], part[..., 1::2])
    both = (a * cosine - b * sine, b * cosine + a * sine)
    return torch.cat([torch.cat(both, -1) if style == "halves" else torch.stack(both, -1).flatten(-2), rest], -1)
