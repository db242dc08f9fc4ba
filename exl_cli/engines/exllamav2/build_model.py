"""Build exllamav2's model from an `Architecture`, bypassing its own reading of config.json.

To exllamav2 0.3.2 every model is a Llama with different norms, activations, scales and windows, set through its
parameters. What its parameters cannot express is patched here:

- RoPE tables, which it derives from the allocated length and its own reading of config.json. We build one per kind of
  layer, with a section for each range of sequence lengths between `Architecture.rope_switches`;
- MoE routing weights that are not normalized, and dense layers among MoE layers;
- EXL2 MLPs with biases: it permutes the columns of gate and up for the down matrix, but not their biases.
"""

from __future__ import annotations

import gc
import math
import types
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from exl_cli.engines.exllamav2.weights import Weights
from exl_cli.models import memory
from exl_cli.models.architecture import Architecture
from exl_cli.models.info import ModelInfo
from exl_cli.models.rope import Rope

# Extra rows past the longest context, for padding tokens of a forward pass.
_SPARE_ROWS = 32


def build_model(info: ModelInfo, architecture: Architecture, max_seq_len: int, *, low_mem: bool) -> Any:
    """Build exllamav2's model object, without loading weights.

    Args:
        info: the model.
        architecture: its architecture.
        max_seq_len: most tokens per sequence.
        low_mem: smaller prefill chunks.
    """
    from exllamav2.config import ExLlamaV2Config
    from exllamav2.model import ExLlamaV2

    _install()
    config = ExLlamaV2Config()
    weights = Weights(info, architecture)
    _set_up(config, info, architecture, weights)
    config.max_seq_len = max_seq_len
    config.exl_rope_switches = architecture.rope_switches(config.max_seq_len)
    if low_mem:
        config.set_low_mem()
    config.max_input_len = min(config.max_input_len, max_seq_len)
    config.no_sdpa = True  # exl replaces its attention, see attention/causal.py
    config.no_graphs = True  # its per-layer graphs cannot be captured within our graph of a forward pass
    model = ExLlamaV2(config)
    kinds = _kinds(architecture)
    for index, attention in enumerate(_attentions(model)):
        window = architecture.windows[index]
        attention.sliding_window = window if window < max_seq_len else 0
        attention.rope_index = kinds.index(architecture.ropes[index])
    _set_up_experts(model, architecture)
    for linear in _linears(model.modules):
        linear.has_bias = f"{linear.key}.bias" in config.tensor_file_map
    return model


def load_modules(model: Any, cache: Any, devices: Sequence[int], progress: Callable[[int, int], None]) -> None:
    """Load the weights and allocate the KV cache, each layer on its GPU.

    Runs a full chunk through each module as it is loaded, which shows whether the memory suffices. Replaces exllamav2's
    `load_autosplit`, which fills one GPU after the other and may part a layer's attention from its MLP.

    Args:
        model: from `build_model`.
        cache: exllamav2's, allocated lazily.
        devices: the index of the GPU of each transformer layer, ascending.
        progress: called with (modules done, modules in all).

    Raises:
        torch.OutOfMemoryError: a GPU has not enough memory.
    """
    from exllamav2.attn import ExLlamaV2Attention
    from exllamav2.device import ExLlamaV2DeviceContext, set_device_streams
    from exllamav2.parallel_decoder import ExLlamaV2ParallelDecoder
    from exllamav2.stloader import cleanup_stfiles

    embeddings, *modules = model.modules
    embeddings.set_device_idx(-1)
    layer = 0
    for module in modules:
        layer = getattr(module, "layer_idx", None) or layer
        module.set_device_idx(devices[layer])
    set_device_streams()
    model.cache_map, model.device_context = {}, [None] * (max(devices) + 1)
    reserve = []
    for device in sorted(set(devices)):
        scratch = max(module.scratch_space_fixed() for module in modules if module.device_idx == device)
        model.device_context[device] = ExLlamaV2DeviceContext(model, device, scratch)
        reserve.append(torch.empty(memory.HELD_BACK, dtype=torch.int8, device=torch.device("cuda", device)))
    with torch.inference_mode():
        progress(0, len(model.modules))
        embeddings.load()
        states = embeddings.forward(torch.zeros((1, model.config.max_input_len), dtype=torch.long))
        params = ExLlamaV2Attention.Params(*states.shape[:2], 0, None, None)
        for index, module in enumerate(modules, 1):
            progress(index, len(model.modules))
            if isinstance(module, (ExLlamaV2Attention, ExLlamaV2ParallelDecoder)):
                model.cache_map[module.layer_idx] = module.device()
                cache.update_cache_tensors()
            module.load()
            states = module.forward(states.to(module.device()), cache=cache, attn_params=params, past_len=0, loras=None)
        progress(len(model.modules), len(model.modules))
    del states, reserve
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_device(devices[0])  # exllamav2's reader leaves the last one current
    model.loaded = True
    cleanup_stfiles()


def rope_switches(model: Any) -> list[int]:
    """See `Architecture.rope_switches`."""
    switches: list[int] = model.config.exl_rope_switches
    return switches


def rope_offsets(model: Any) -> list[int]:
    """First row of each RoPE table section, the one for the shortest sequences first."""
    return [0, *accumulate(rope_switches(model))]


def experts_captured(model: Any) -> float:
    """Most tokens for which a CUDA graph can capture exllamav2's MoE layers; infinite without experts.

    exllamav2 0.3.2 (`ExLlamaV2MoEMLP.forward`) has kernels for up to four tokens and certain numbers of experts.
    Otherwise it routes on the CPU.
    """
    experts = model.config.exl_architecture.experts
    if experts is None:
        return math.inf
    return 4 if experts.normalized and experts.count in (4, 8, 16, 128) else 0


def _kinds(architecture: Architecture) -> list[Rope | None]:
    """The distinct RoPEs of a model, in the order of its tables."""
    return list(dict.fromkeys(architecture.ropes)) if architecture.ropes else [None]


def _set_up(config: Any, info: ModelInfo, architecture: Architecture, weights: Weights) -> None:
    """Fill in everything that exllamav2 would read from a model folder."""
    from exllamav2.architecture import ExLlamaV2ArchParams, RopeStyle

    arch = ExLlamaV2ArchParams("LlamaForCausalLM", {})
    experts = architecture.experts
    before, after, before_mlp, after_mlp = (f".{name}" if name else None for name in architecture.norms)
    mlp = ".mlp.experts.*." if experts else ".mlp."
    arch.lm.keys.update(
        norm_1=before, norm_1_post=after, norm_2=before_mlp, norm_2_post=after_mlp,
        mlp_gate=f"{mlp}gate_proj" if architecture.gated else None, mlp_up=f"{mlp}up_proj", mlp_down=f"{mlp}down_proj",
        mlp_expert_gate=".mlp.gate", learned_pos_emb="model.wpe" if architecture.learned_positions else None,
    )  # fmt: skip
    names = {"rms": "rmsnorm", "layer": "layernorm"}
    arch.lm.norm = names[architecture.norm]
    arch.lm.headnorm = names[architecture.head_norm or "rms"]
    arch.lm.norm_constant_bias = architecture.norm_offset
    arch.lm.parallel_decoder_blocks = architecture.parallel
    arch.lm.mlp_act_func = architecture.activation
    arch.lm.mlp_gate = architecture.gated
    arch.lm.is_moe = experts is not None
    styles = {"halves": RopeStyle.NEOX, "pairs": RopeStyle.GPTJ, "none": RopeStyle.NONE}
    arch.lm.rope_style = styles[architecture.rotary]
    arch.lm.residual_stream_fp32 = architecture.wide_residual
    # Scale embeddings after the lookup, in float32: scaling the float16 table would round.
    arch.lm.normalize_embeddings = architecture.wide_residual
    config.arch, config.architecture = arch, info.architecture
    config.model_dir, config.generation_config = str(info.path), {}
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config.vocab_size, config.hidden_size = architecture.vocabulary, architecture.hidden
    config.num_hidden_layers, config.head_dim = architecture.layers, architecture.head_dim
    config.num_attention_heads, config.num_key_value_heads = architecture.heads, architecture.kv_heads
    config.num_key_value_groups = architecture.heads // architecture.kv_heads
    config.intermediate_size = experts.inner if experts else architecture.inner
    config.num_experts = experts.count if experts else None
    config.num_experts_per_token = experts.per_token if experts else None
    config.norm_eps, config.use_qk_norm = architecture.norm_eps, architecture.head_norm is not None
    config.attention_multiplier, config.query_pre_attn_scalar = architecture.attention_scale, None
    config.attn_logit_softcapping = architecture.attention_softcap or None
    config.final_logit_softcapping = architecture.logit_softcap or None
    config.logit_scale, config.scale_depth = architecture.logit_scale, architecture.residual_scale
    config.scale_emb = 1 if architecture.wide_residual else architecture.embedding_scale
    config.norm_head = None  # see Weights
    # Windows and RoPE tables are set per layer, in build_model.
    config.sliding_window = config.pos_id_index = 0
    config.sliding_window_pattern = 1
    dims = {rope.dim for rope in architecture.ropes if rope} or {architecture.head_dim}
    config.partial_rotary_factor = max(dims) / architecture.head_dim
    config.mrope_section = config.vision_model_type = config.vision_fullatt_block_indexes = None
    config.checkpoint_fused_mlp = False
    config.checkpoint_offset_qzeros = info.format == "gptq" and info.zero_offset == 0
    config.tensor_files = []
    config.tensor_file_map = dict.fromkeys(weights.names, weights)
    config.exl_architecture = architecture


@cache
def _install() -> None:
    """Patch exllamav2 to read tensors through `Weights` and to use our RoPE tables."""
    from exllamav2 import device, linear, module

    class Files:
        @staticmethod
        def open(weights: Weights, keymap: Any = None) -> Weights:
            return weights

    load = linear.ExLlamaV2Linear.load

    def load_with_bias(self: Any, *args: Any, output_map: torch.Tensor | None = None, **kwargs: Any) -> Any:
        perm = load(self, *args, output_map=output_map, **kwargs)
        if output_map is not None and "bias" in (self.q_tensors or {}):
            bias = self.q_tensors["bias"]
            bias.copy_(bias[output_map.to(bias.device).long() & 0xFFFF])
        return perm

    linear.ExLlamaV2Linear.load = load_with_bias
    module.STFile = Files
    device.ExLlamaV2DeviceContext.prepare_sincos = _prepare_tables


def _prepare_tables(context: Any) -> None:
    """Replaces `ExLlamaV2DeviceContext.prepare_sincos`."""
    config, device = context.model.config, torch.device("cuda", context.device_idx)
    architecture: Architecture = config.exl_architecture
    context.sin, context.cos = [], []
    for rope in _kinds(architecture):
        if architecture.rotary == "none":
            sine = cosine = torch.zeros((1,), dtype=torch.half, device=device)
        else:
            sine, cosine = _tables(architecture, rope, [*rope_switches(context.model), config.max_seq_len], device)
        context.sin.append(sine)
        context.cos.append(cosine)


def _tables(
    architecture: Architecture, rope: Rope | None, lengths: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine and cosine tables, float16 [1, 1, rows, rotated dim]; identity for a layer without RoPE.

    Each length gets a section with that many rows, for sequences longer than the previous length; the last section has
    _SPARE_ROWS more.
    """
    pairs = next((other.dim for other in architecture.ropes if other), architecture.head_dim) // 2
    parts = []
    for shortest, longest in pairwise([0, *lengths]):
        frequencies = rope.frequencies((shortest + 1 + longest) // 2) if rope else [0.0] * pairs
        rows = longest + (_SPARE_ROWS if longest == lengths[-1] else 0)
        positions = torch.arange(rows, dtype=torch.float32, device=device)
        parts.append(positions[:, None] * torch.tensor(frequencies, dtype=torch.float32, device=device))
    angles = torch.cat(parts)
    whole = torch.cat((angles, angles), -1) if architecture.rotary == "halves" else angles.repeat_interleave(2, -1)
    factor = rope.attention_factor if rope else 1.0
    return (whole.sin() * factor).half()[None, None], (whole.cos() * factor).half()[None, None]


def _attentions(model: Any) -> list[Any]:
    from exllamav2.attn import ExLlamaV2Attention
    from exllamav2.parallel_decoder import ExLlamaV2ParallelDecoder

    return [
        module.attn if isinstance(module, ExLlamaV2ParallelDecoder) else module
        for module in model.modules
        if isinstance(module, (ExLlamaV2Attention, ExLlamaV2ParallelDecoder))
    ]


def _linears(modules: Any) -> list[Any]:
    from exllamav2.linear import ExLlamaV2Linear

    inside = [module for outer in modules for module in (outer, *outer.submodules)]
    return [module for module in inside if isinstance(module, ExLlamaV2Linear)]


def _set_up_experts(model: Any, architecture: Architecture) -> None:
    from exllamav2.mlp import ExLlamaV2MLP
    from exllamav2.moe_mlp import ExLlamaV2MoEMLP

    experts = architecture.experts
    for index, module in enumerate(model.modules):
        if experts is None or not isinstance(module, ExLlamaV2MoEMLP):
            continue
        if module.layer_idx in experts.dense:
            keys, params = model.config.arch.lm.keys, model.config.arch.lm
            expert_keys = {name: keys[name] for name in ("mlp_gate", "mlp_up", "mlp_down")}
            # The module reads the keys in its constructor only.
            params.keys = {**keys, **{name: key.replace(".experts.*", "") for name, key in expert_keys.items()}}
            model.modules[index] = ExLlamaV2MLP(model, module.key, module.layer_idx, interm_features=architecture.inner)
            params.keys = keys
        elif not experts.normalized:
            module.forward = types.MethodType(_forward_experts, module)
    model.modules_dict = {inner.key: inner for module in model.modules for inner in (module.submodules or [module])}


def _forward_experts(experts: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """MoE forward without normalized routing weights (Qwen 3 MoE; Fedus et al. 2021).

    Replaces `ExLlamaV2MoEMLP.forward`, which always normalizes them.
    """
    states = hidden_states.view(-1, hidden_states.shape[-1])
    normed = experts.post_attention_layernorm.forward(states)
    probabilities = F.softmax(experts.gate.forward(normed), dim=-1, dtype=torch.float)
    weights, chosen = torch.topk(probabilities, experts.num_experts_per_token, dim=-1)
    activation = F.silu if experts.archparams.mlp_act_func == "silu" else F.gelu
    total = torch.zeros_like(states, dtype=torch.float)
    for index in range(experts.num_experts):
        rows, places = torch.where(chosen == index)
        if not len(rows):
            continue
        inner = activation(experts.w1[index].forward(normed[rows])) * experts.w3[index].forward(normed[rows])
        out = experts.w2[index].forward(inner)
        total.index_add_(0, rows, out.float() * weights[rows, places, None])
    return (states + total.to(states.dtype)).view(hidden_states.shape)
