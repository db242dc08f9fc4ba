"""Small random models on disk in every format, with the float weights that they stand for.

Made with the tests' own packer (`quantize`), so that what a model must compute is known without the product's
unpackers.
"""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import quantize
import torch
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER = Path(__file__).parent / "data" / "fable-7m-gptq"
HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, VOCAB = 256, 512, 2, 4, 2, 4096


@dataclass(frozen=True)
class Variant:
    """What to make.

    Attributes:
        format: "exl2", "gptq" or "float".
        bits: for EXL2, the bits of successive groups, used in turn.
        group_size: rows of a group; -1 for one group.
        act_order: for GPTQ, rows belong to groups in random order.
        zero_offset: for GPTQ, 1 is the original convention, 0 is gptq_v2.
        symmetric: for GPTQ, every zero point is 8.
        store_g_idx: for GPTQ, write the tensor.
        tied: the output layer is the embedding matrix.
        quantized_head: for EXL2, the output layer is quantized too.
        bias: the attention projections q, k and v have one (Qwen2).
        shards: files to spread the tensors over.
        dtype: of the unquantized tensors.
        config: changes to config.json, which the weights do not depend on.
    """

    format: str
    bits: tuple[int, ...] = (4,)
    group_size: int = 128
    act_order: bool = False
    zero_offset: int = 1
    symmetric: bool = False
    store_g_idx: bool = True
    tied: bool = False
    quantized_head: bool = False
    bias: bool = False
    shards: int = 1
    dtype: torch.dtype = torch.float16
    config: dict[str, Any] = field(default_factory=dict, compare=False)


def config_of(variant: Variant) -> dict[str, Any]:
    """The model's config.json."""
    family = ("Qwen2ForCausalLM", "qwen2") if variant.bias else ("LlamaForCausalLM", "llama")
    quantization: dict[str, Any] = {}
    if variant.format == "exl2":
        quantization = {
            "quant_method": "exl2",
            "version": "0.3.2",
            "bits": float(np.mean(variant.bits)),
            "head_bits": 6,
        }
    if variant.format == "gptq":
        quantization = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": variant.group_size,
            "desc_act": variant.act_order,
            "sym": variant.symmetric,
            "checkpoint_format": "gptq" if variant.zero_offset else "gptq_v2",
        }
    config = {
        "architectures": [family[0]],
        "model_type": family[1],
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": variant.tied,
        "torch_dtype": "float16",
        **({"quantization_config": quantization} if quantization else {}),
        **variant.config,
    }
    return {key: value for key, value in config.items() if value is not None}


def write(folder: Path, variant: Variant, seed: int = 0) -> dict[str, Tensor]:
    """Write a model folder; returns the float32 state that it stands for, under transformers' names."""
    stored, state = _tensors(variant, seed)
    _save(folder, stored, variant)
    return dict(state)


@functools.lru_cache(maxsize=20)
def _tensors(variant: Variant, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors as they are stored, and as they are meant."""
    rng = np.random.default_rng(seed)
    stored: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        stored[name] = tensor.to(variant.dtype)
        state[name] = stored[name].float()

    def linear(name: str, rows: int, columns: int, quantized: bool = True, bias: bool = False) -> None:
        tensors, weight = _linear(rng, variant if quantized else Variant("float"), rows, columns)
        # The spread of a trained layer, so that signals neither die nor explode on the way through.
        factor = 2.0 ** round(np.log2(rows**-0.5 / weight.std()))
        for part in ("scales", "q_scale_max", "weight"):
            if part in tensors:
                tensors[part] = tensors[part] * factor
        stored.update({f"{name}.{part}": tensor for part, tensor in tensors.items()})
        state[f"{name}.weight"] = torch.from_numpy(weight * factor).float()
        if bias:
            keep(f"{name}.bias", torch.from_numpy(rng.normal(size=columns) * 0.1))

    keep("model.embed_tokens.weight", _numbers(rng, VOCAB, HIDDEN) * 0.5)
    keep("model.norm.weight", torch.from_numpy(rng.uniform(0.8, 1.2, HIDDEN)))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, columns in (("q_proj", HEADS * 64), ("k_proj", KV_HEADS * 64), ("v_proj", KV_HEADS * 64)):
            linear(prefix + "self_attn." + name, HIDDEN, columns, bias=variant.bias)
        linear(prefix + "self_attn.o_proj", HEADS * 64, HIDDEN)
        linear(prefix + "mlp.gate_proj", HIDDEN, INTER)
        linear(prefix + "mlp.up_proj", HIDDEN, INTER)
        linear(prefix + "mlp.down_proj", INTER, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            keep(f"{prefix}{name}.weight", torch.from_numpy(rng.uniform(0.8, 1.2, HIDDEN)))
    if not variant.tied:
        linear("lm_head", HIDDEN, VOCAB, quantized=variant.quantized_head)
    return stored, state


def _linear(rng: np.random.Generator, variant: Variant, rows: int, columns: int) -> tuple[dict[str, Tensor], Any]:
    size = rows if variant.group_size == -1 else variant.group_size
    groups = -(-rows // size)
    if variant.format == "exl2":
        # Widths run from many bits to few, as exllamav2's converter writes them.
        bits = sorted((variant.bits[i % len(variant.bits)] for i in range(groups)), reverse=True)
        scale = rng.integers(4, 16, (groups, columns))
        limit = np.exp2(-np.array(bits, dtype=np.float64))
        largest = (1 << np.repeat(bits, size)[:, None]) - 1
        codes = rng.integers(0, 256, (rows, columns), np.uint8) & largest.astype(np.uint8)
        numbers = (codes, scale, limit, bits, [size] * groups, rng.permutation(rows))
        return quantize.pack_exl2(*numbers), quantize.exl2_weight(*numbers)
    if variant.format == "gptq":
        g_idx = np.arange(rows) // size
        if variant.act_order:
            g_idx = rng.permutation(g_idx)
        codes = rng.integers(0, 16, (rows, columns), np.uint8)
        low, high = (8, 9) if variant.symmetric else (1, 16)
        zeros = rng.integers(low, high, (groups, columns))
        scales = rng.uniform(0.5, 1.5, (groups, columns)).astype(np.float16)
        stored = g_idx if variant.store_g_idx else None
        tensors = quantize.pack_gptq(codes, zeros, scales, stored, zero_offset=variant.zero_offset)
        return tensors, quantize.gptq_weight(codes, zeros, scales, g_idx)
    weight = _numbers(rng, columns, rows).to(torch.float16)
    return {"weight": weight}, weight.float().numpy()


def _numbers(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Float32 numbers of variance 1; uniform, because a million normal ones take longer than the whole model."""
    return torch.from_numpy((rng.random((rows, columns), np.float32) - 0.5) * np.float32(12**0.5))


def _save(folder: Path, stored: dict[str, Tensor], variant: Variant) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config_of(variant)))
    names = sorted(stored)
    if variant.shards == 1:
        save_file({name: stored[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for shard in range(variant.shards):
        file = f"model-{shard + 1:05d}-of-{variant.shards:05d}.safetensors"
        part = names[shard :: variant.shards]
        save_file({name: stored[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def reference_model(state: dict[str, Tensor], variant: Variant) -> Any:
    """Transformers' own model with those weights, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    raw = {key: value for key, value in config_of(variant).items() if key != "quantization_config"}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=torch.float32).eval()
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def reference_logits(state: dict[str, Tensor], variant: Variant, ids: list[int]) -> Tensor:
    """Float32 logits [len(ids), VOCAB] of transformers' own model with those weights."""
    with torch.inference_mode():
        logits: Tensor = reference_model(state, variant)(torch.tensor([ids])).logits[0]
    return logits


VARIANTS: dict[str, Variant] = {
    "exl2-every-width": Variant("exl2", bits=(8, 6, 5, 4, 3, 2), group_size=32, quantized_head=True),
    "exl2-2bit": Variant("exl2", bits=(2,), group_size=64),
    "exl2-3bit-sharded": Variant("exl2", bits=(3,), shards=2),
    "exl2-5-and-4": Variant("exl2", bits=(5, 4), group_size=32),
    "exl2-bias": Variant("exl2", bits=(6, 4), bias=True, group_size=64),
    "gptq": Variant("gptq", symmetric=True),
    "gptq-asymmetric-g32": Variant("gptq", group_size=32),
    "gptq-one-group": Variant("gptq", group_size=-1),
    "gptq-act-order": Variant("gptq", act_order=True, group_size=64),
    "gptq-v2": Variant("gptq", zero_offset=0, group_size=64),
    "gptq-no-g-idx": Variant("gptq", store_g_idx=False, group_size=64),
    "gptq-bias": Variant("gptq", bias=True, symmetric=True),
    "gptq-tied": Variant("gptq", tied=True, symmetric=True),
    "float16": Variant("float"),
    "float32-sharded": Variant("float", dtype=torch.float32, shards=3),
    "bfloat16-tied": Variant("float", dtype=torch.bfloat16, tied=True),
    "rope-parameters": Variant(
        "gptq",
        symmetric=True,
        config={"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "rope-llama3": Variant(
        "exl2",
        bits=(4,),
        config={
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
}
