"""Translate config.json into an `Architecture`, the description of a text model that the GPU engine builds from.

exllamav2 0.3.2's own tables are incomplete (layer norm for Qwen 3's heads, no sliding window for Mistral, no
`rope_parameters`), so we use none of them. A wrong reading would give fluent nonsense, so `read` rejects any key or
tensor that could change the computation and that the architecture's reader does not handle. The tests compare with
transformers in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from exl_cli.errors import UnsupportedModelError
from exl_cli.models.config import context_length_of, value_of
from exl_cli.models.info import ModelInfo
from exl_cli.models.rope import FULL, SLIDING, Rope, ropes

Norm = Literal["rms", "layer"]
RotaryStyle = Literal["halves", "pairs", "none"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (MoE) in place of the MLP.

    Attributes:
        count, per_token: experts per layer, and how many of them each token is routed to.
        inner: intermediate size of one expert.
        normalized: whether the routing weights of a token are normalized to sum to 1.
        dense: indices of layers with an ordinary MLP.
    """

    count: int
    per_token: int
    inner: int
    normalized: bool = True
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Architecture:
    """A text model's dimensions and everything else that determines its forward pass.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, inner, vocabulary: sizes; `inner` is the MLP's intermediate size.
        norm, norm_eps, norm_offset: type, epsilon, and a constant added to the norms' weights (1 for Gemma).
        norms: names of a layer's norms before attention, after attention, before the MLP, after the MLP; empty if
            there is none.
        head_norm: norm applied to each query and key head; None if there is none.
        parallel: attention and MLP both read the same normed hidden states.
        activation: "silu" or "gelu"; `gated` for a gated MLP (act(gate) * up).
        rotary: which elements of a head RoPE rotates together: "halves" (i and i + dim / 2) or "pairs" (2i and 2i + 1).
        ropes: one per layer; None for a layer without RoPE.
        windows: one sliding window per layer, in tokens, including the query's own; 0 for full attention.
        learned_positions: number of learned position embeddings; 0 for none.
        attention_scale: multiplies the query-key products.
        attention_softcap, logit_softcap: cap * tanh(x / cap) on attention scores and logits; 0 for none.
        embedding_scale, residual_scale, logit_scale: multiply the embeddings, each block's output before it is added
            to the residual, and the logits.
        wide_residual: the residual stream overflows float16 and is kept in float32.
        normalized_head: rows of the output head are scaled to unit length.
        experts: None for an ordinary MLP.
        names: (pattern, replacement) pairs that turn tensor names into Llama's.
        fused: tensors that concatenate several of Llama's; see `Fused`.
        transposed: unquantized matrices are stored as [inputs, outputs].
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    norm: Norm
    norm_eps: float
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    norm_offset: float = 0.0
    head_norm: Norm | None = None
    parallel: bool = False
    activation: Literal["silu", "gelu"] = "silu"
    gated: bool = True
    rotary: RotaryStyle = "halves"
    ropes: tuple[Rope | None, ...] = ()
    windows: tuple[int, ...] = ()
    learned_positions: int = 0
    attention_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    wide_residual: bool = False
    normalized_head: bool = False
    experts: Experts | None = None
    tied: bool = False
    names: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fused, ...] = ()
    transposed: bool = False

    def rope_switches(self, context: int) -> list[int]:
        """Sequence lengths, up to `context`, at which any layer's RoPE frequencies change; see `Rope.switches`."""
        return sorted({length for rope in self.ropes if rope for length in rope.switches(context)})


@dataclass(frozen=True)
class Fused:
    """A matrix that concatenates several of Llama's along its outputs, such as a QKV projection.

    Attributes:
        name: its name within a layer.
        parts: name of each Llama matrix within a layer, and the ranges of output rows that make it up, in order.
    """

    name: str
    parts: tuple[tuple[str, tuple[range, ...]], ...]


class _Keys:
    """The text model's part of config.json. Records which keys were read: the others are checked afterwards."""

    def __init__(self, info: ModelInfo) -> None:
        nested = info.config.get("text_config")
        self.text: Mapping[str, Any] = nested if isinstance(nested, dict) and nested else info.config
        self.read: set[str] = set()
        self._config = info.config

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these keys with a value, in config.json or in its model type's defaults."""
        self.read.update(names)
        values = (value_of(self._config, name) for name in names)
        return next((value for value in values if value is not None), default)

    def whole(self, *names: str, default: int | None = None) -> int:
        """`get` for a positive integer."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _NotComputedError(f"{names[0]} is {value!r}")
        return value

    def number(self, *names: str, default: float) -> float:
        """`get` for a finite number."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise _NotComputedError(f"{names[0]} is {value!r}")
        return float(value)


class _NotComputedError(Exception):
    """Names a feature of the model that the GPU engine does not implement."""


def read(info: ModelInfo) -> Architecture:
    """Read a model's architecture from its config.json and tensor names.

    Raises:
        UnsupportedModelError: the architecture or one of its features is not implemented; the message names it.
    """
    reader = _READERS.get(info.architecture)
    if reader is None:
        raise UnsupportedModelError(f"exllamav2 does not support {info.architecture}")
    keys = _Keys(info)
    try:
        architecture = reader(keys)
        _refuse_unread(keys)
        _refuse_unknown_tensors(info, architecture)
    except _NotComputedError as problem:
        raise UnsupportedModelError(f"{info.architecture}: {problem} is not supported on the GPU") from problem
    except ValueError as problem:
        raise UnsupportedModelError(f"{info.architecture}: {problem}") from problem
    except (TypeError, ArithmeticError) as problem:
        raise UnsupportedModelError(f"{info.architecture}: config.json has an invalid value ({problem})") from problem
    return architecture


# --- defaults, windows --------------------------------------------------------------------------------------------

# exllamav2's kernels use the tanh approximation for every GELU; it is off by 0.0005 at most.
_ACTIVATIONS: dict[str, Literal["silu", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


def _base(
    keys: _Keys,
    *,
    norm: Norm = "rms",
    eps: tuple[str, ...] = ("rms_norm_eps",),
    default_eps: float = 1e-6,
    theta: float = 10000.0,
    local_theta: float | None = None,
    partial: float | None = None,
    activation: str = "silu",
    head_dim: int | None = None,
    windows: Callable[[_Keys, int], list[int]] | None = None,
    tied: bool = False,
) -> Architecture:
    """A Llama-like architecture. The keyword arguments are the defaults of the model's class in transformers.

    Args:
        norm, eps, default_eps: type of norm, the keys of its epsilon, and the default.
        theta, local_theta, partial: see `ropes`.
        activation, head_dim, tied: defaults.
        windows: reads the sliding window of each layer; None for full attention.
    """
    hidden = keys.whole("hidden_size", "n_embd", "d_model")
    layers = keys.whole("num_hidden_layers", "n_layer", "n_layers")
    heads = keys.whole("num_attention_heads", "n_head", "n_heads", default=1)
    head_dim = keys.whole("head_dim", default=head_dim or hidden // heads)
    layer_windows = windows(keys, layers) if windows else [0] * layers
    context_length = context_length_of(keys.text)
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor"):
        keys.get(name)
    by_kind = ropes(keys.text, head_dim, context_length, theta=theta, local_theta=local_theta, partial=partial)
    act = keys.get("hidden_activation", "hidden_act", "activation_function", default=activation)
    if act not in _ACTIVATIONS:
        raise _NotComputedError(f"the activation {act!r}")
    keys.get("attention_bias", "mlp_bias", "bias")  # the bias tensors themselves decide
    return Architecture(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=keys.whole("num_key_value_heads", default=heads),
        head_dim=head_dim,
        inner=keys.whole("intermediate_size", "n_inner", default=4 * hidden),
        vocabulary=keys.whole("vocab_size"),
        norm=norm,
        norm_eps=keys.number(*eps, default=default_eps),
        activation=_ACTIVATIONS[act],
        ropes=tuple(by_kind.get(SLIDING if window else FULL) or by_kind[FULL] for window in layer_windows),
        windows=tuple(layer_windows),
        attention_scale=head_dim**-0.5,
        tied=bool(keys.get("tie_word_embeddings", default=tied)),
    )


def _window(keys: _Keys, default: int | None = None) -> int:
    keys.read.add("sliding_window")
    if "sliding_window" in keys.text:
        default = keys.text["sliding_window"]
    if default is None:
        return 0
    if isinstance(default, bool) or not isinstance(default, int) or default < 0:
        raise _NotComputedError(f"sliding_window is {default!r}")
    return default


def _everywhere(default: int | None = None) -> Callable[[_Keys, int], list[int]]:
    """The same window in all layers (Mistral)."""
    return lambda keys, layers: [_window(keys, default)] * layers


def _by_kind(keys: _Keys, layers: int, window: int, kinds: list[bool]) -> list[int]:
    """`window` for layers that `layer_types` calls sliding; without `layer_types`, for those marked in `kinds`."""
    layer_types = keys.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != layers or not {*layer_types} <= {FULL, SLIDING}:
            raise _NotComputedError("layer_types of this model")
        kinds = [name == SLIDING for name in layer_types]
    return [window if sliding else 0 for sliding in kinds]


def _alternating(pattern: int) -> Callable[[_Keys, int], list[int]]:
    """Sliding windows, with full attention in every `pattern`-th layer (Gemma, Cohere 2)."""

    def windows(keys: _Keys, layers: int) -> list[int]:
        period = keys.whole("sliding_window_pattern", default=pattern)
        kinds = [bool((index + 1) % period) for index in range(layers)]
        return _by_kind(keys, layers, _window(keys, 4096), kinds)

    return windows


def _from_a_layer_on(keys: _Keys, layers: int) -> list[int]:
    """Qwen 2 and 3: sliding windows from layer `max_window_layers` on, if `use_sliding_window` is set."""
    window = _window(keys, 4096) if keys.get("use_sliding_window", default=False) else 0
    first = keys.get("max_window_layers", default=28)
    keys.read.add("sliding_window")
    return _by_kind(keys, layers, window, [index >= first for index in range(layers)])


def _qwen_moe_windows(keys: _Keys, layers: int) -> list[int]:
    window = _window(keys, 4096) if keys.get("use_sliding_window", default=False) else 0
    keys.read.update(("sliding_window", "max_window_layers"))
    return [window] * layers


# --- one reader for each architecture -----------------------------------------------------------------------------


def _llama(keys: _Keys) -> Architecture:
    keys.get("pretraining_tp")  # splits the matmuls, with the same result
    return _base(keys)


def _mistral(keys: _Keys) -> Architecture:
    return _base(keys, windows=_everywhere(4096))


def _mixtral(keys: _Keys) -> Architecture:
    base = _base(keys, default_eps=1e-5, theta=1e6, windows=_everywhere())
    experts = Experts(
        keys.whole("num_local_experts", "num_experts", default=8),
        keys.whole("num_experts_per_tok", default=2),
        base.inner,
    )
    names = (
        (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
    )
    return replace(base, experts=experts, names=names)


def _qwen2(keys: _Keys) -> Architecture:
    return _base(keys, windows=_from_a_layer_on)


def _qwen2_vl(keys: _Keys) -> Architecture:
    keys.get("use_mrope")
    return _base(keys, default_eps=1e-5, theta=1e6, windows=_from_a_layer_on)


def _qwen3(keys: _Keys) -> Architecture:
    return replace(_base(keys, head_dim=128, windows=_from_a_layer_on), head_norm="rms")


def _qwen3_moe(keys: _Keys) -> Architecture:
    base = _base(keys, windows=_qwen_moe_windows)
    count = keys.whole("num_experts", "num_local_experts", default=128)
    step = keys.whole("decoder_sparse_step", default=1)
    dense = {index for index in range(base.layers) if (index + 1) % step}
    dense.update(keys.get("mlp_only_layers", default=[]))
    experts = Experts(
        count,
        keys.whole("num_experts_per_tok", default=8),
        keys.whole("moe_intermediate_size", default=768),
        bool(keys.get("norm_topk_prob", default=False)),
        frozenset(dense),
    )
    return replace(base, head_norm="rms", experts=experts)


def _gemma(keys: _Keys) -> Architecture:
    base = _base(keys, activation="gelu_pytorch_tanh", head_dim=256, tied=True)
    _refuse_bidirectional(keys)
    return replace(base, norm_offset=1.0, embedding_scale=base.hidden**0.5)


_FOUR_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip


def _gemma2(keys: _Keys) -> Architecture:
    base = _base(keys, activation="gelu_pytorch_tanh", head_dim=256, windows=_alternating(2), tied=True)
    return _gemma_23(keys, base, attention=50.0, logits=30.0)


def _gemma3(keys: _Keys) -> Architecture:
    base = _base(
        keys, theta=1e6, local_theta=10000.0, activation="gelu_pytorch_tanh", head_dim=256, windows=_alternating(6),
        tied=True,
    )  # fmt: skip
    return replace(_gemma_23(keys, base, attention=None, logits=None), head_norm="rms")


def _gemma_23(keys: _Keys, base: Architecture, attention: float | None, logits: float | None) -> Architecture:
    _refuse_bidirectional(keys)
    keys.get("sliding_window_size")  # duplicates sliding_window; transformers does not read it

    def cap(name: str, default: float | None) -> float:
        keys.read.add(name)
        value = keys.text.get(name, default)
        return float(value) if isinstance(value, (int, float)) else 0.0

    return replace(
        base,
        norms=_FOUR_NORMS,
        norm_offset=1.0,
        embedding_scale=base.hidden**0.5,
        wide_residual=True,
        attention_scale=keys.number("query_pre_attn_scalar", default=256) ** -0.5,
        attention_softcap=cap("attn_logit_softcapping", attention),
        logit_softcap=cap("final_logit_softcapping", logits),
    )


def _refuse_bidirectional(keys: _Keys) -> None:
    if keys.get("use_bidirectional_attention"):
        raise _NotComputedError("use_bidirectional_attention")


def _cohere(keys: _Keys) -> Architecture:
    base = _base(keys, norm="layer", eps=("layer_norm_eps",), default_eps=1e-5, theta=500000.0, tied=True)
    return _cohere_12(keys, replace(base, head_norm="layer" if keys.get("use_qk_norm") else None))


def _cohere2(keys: _Keys) -> Architecture:
    base = _base(
        keys, norm="layer", eps=("layer_norm_eps",), default_eps=1e-5, windows=_alternating(4), tied=True
    )  # fmt: skip
    # Full-attention layers have no positional encoding (NoPE).
    local = tuple(rope if window else None for rope, window in zip(base.ropes, base.windows, strict=True))
    return _cohere_12(keys, replace(base, ropes=local))


def _cohere_12(keys: _Keys, base: Architecture) -> Architecture:
    # Keys of Cohere's own code; their published values are what the class implements.
    keys.get("layer_switch", "order_of_interleaved_layers", "use_gated_activation", "use_parallel_block")
    scale = keys.number("logit_scale", default=0.0625)
    return replace(base, norms=("input_layernorm", "", "", ""), parallel=True, rotary="pairs", logit_scale=scale)


def _granite(keys: _Keys) -> Architecture:
    return replace(
        _base(keys),
        embedding_scale=keys.number("embedding_multiplier", default=1.0),
        residual_scale=keys.number("residual_multiplier", default=1.0),
        logit_scale=1 / (keys.number("logits_scaling", default=1.0) or 1.0),
        attention_scale=keys.number("attention_multiplier", default=1.0),
    )


def _minicpm(keys: _Keys) -> Architecture:
    base = _base(keys)
    return replace(
        base,
        embedding_scale=keys.number("scale_emb", default=1.0),
        residual_scale=keys.number("scale_depth", default=base.layers**0.5) / base.layers**0.5,
        logit_scale=keys.number("dim_model_base", default=base.hidden) / base.hidden,
    )


def _index(keys: _Keys) -> Architecture:
    return replace(_base(keys), normalized_head=bool(keys.get("norm_head")))


def _orion(keys: _Keys) -> Architecture:
    return _base(keys, norm="layer")


def _yi(keys: _Keys) -> Architecture:
    names = ((r"\.ln1\.", ".input_layernorm."), (r"\.ln2\.", ".post_attention_layernorm."))
    return replace(_base(keys), names=names)


def _starcoder2(keys: _Keys) -> Architecture:
    base = _base(
        keys, norm="layer", eps=("norm_epsilon", "layer_norm_epsilon"), default_eps=1e-5,
        activation="gelu_pytorch_tanh", windows=_everywhere(), tied=True,
    )  # fmt: skip
    keys.get("use_bias", "norm_type", "mlp_type")
    names = ((r"\.mlp\.c_fc\.", ".mlp.up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj."))
    return replace(base, gated=False, names=names)


def _phi3(keys: _Keys) -> Architecture:
    base = _base(keys, default_eps=1e-5, partial=1.0, windows=_everywhere())
    keys.get("original_max_position_embeddings")
    return replace(base, fused=(_qkv(base, "self_attn.qkv_proj"), _gate_up(base)))


def _glm4(keys: _Keys) -> Architecture:
    base = _base(keys, default_eps=1.5625e-7, partial=0.5, head_dim=128)
    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return replace(base, rotary="pairs", norms=norms, fused=(_gate_up(base),))


def _internlm2(keys: _Keys) -> Architecture:
    base = _base(keys)
    names = (
        (r"^model\.tok_embeddings\.", "model.embed_tokens."),
        (r"^output\.", "lm_head."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    )
    # wqkv interleaves per key-value head: its group of query heads, the key head, the value head.
    width, group = base.head_dim, base.heads // base.kv_heads
    starts = range(0, base.kv_heads * (group + 2) * width, (group + 2) * width)
    parts = (
        ("self_attn.q_proj", tuple(range(start, start + group * width) for start in starts)),
        ("self_attn.k_proj", tuple(range(start + group * width, start + (group + 1) * width) for start in starts)),
        (
            "self_attn.v_proj",
            tuple(range(start + (group + 1) * width, start + (group + 2) * width) for start in starts),
        ),
    )
    return replace(base, names=names, fused=(Fused("self_attn.wqkv", parts),))


_GPT_NAMES = (
    (r"^(?:transformer\.)?h\.", "model.layers."),
    (r"^(?:transformer\.)?wte\.", "model.embed_tokens."),
    (r"^(?:transformer\.)?wpe\.", "model.wpe."),
    (r"^(?:transformer\.)?ln_f\.", "model.norm."),
    (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
    (r"\.attn\.c_attn\.", ".self_attn.c_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
)


def _gpt(keys: _Keys, activation: str) -> Architecture:
    base = _base(
        keys, norm="layer", eps=("layer_norm_epsilon",), default_eps=1e-5, activation=activation, tied=True
    )  # fmt: skip
    if keys.get("scale_attn_weights", default=True) is not True or keys.get("scale_attn_by_inverse_layer_idx"):
        raise _NotComputedError("attention scaled by layer, or not at all,")
    if keys.get("add_cross_attention"):
        raise _NotComputedError("add_cross_attention")
    positions = keys.whole("n_positions", "max_position_embeddings", default=1024)
    return replace(
        base,
        norms=("ln_1", "", "ln_2", ""),
        gated=False,
        rotary="none",
        ropes=(None,) * base.layers,
        learned_positions=positions,
        names=_GPT_NAMES,
        fused=(_qkv(base, "self_attn.c_attn"),),
    )


def _gpt2(keys: _Keys) -> Architecture:
    return replace(_gpt(keys, "gelu_new"), transposed=True)


def _gpt_bigcode(keys: _Keys) -> Architecture:
    base = _gpt(keys, "gelu_pytorch_tanh")
    if keys.get("multi_query", default=True):
        base = replace(base, kv_heads=1)
        return replace(base, fused=(_qkv(base, "self_attn.c_attn"),))
    # c_attn interleaves per head: query, key, value.
    width = base.head_dim
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    parts = tuple(
        (name, tuple(range(start, start + width) for start in range(index * width, 3 * base.heads * width, 3 * width)))
        for index, name in enumerate(names)
    )
    return replace(base, fused=(Fused("self_attn.c_attn", parts),))


def _dbrx(keys: _Keys) -> Architecture:
    raise _NotComputedError("clip_qkv")


def _multimodal(keys: _Keys) -> Architecture:
    """Llava and Mistral 3: a vision tower, which we ignore, and a text model named by `text_config.model_type`."""
    model_type = keys.get("model_type")
    model_type = keys.text.get("model_type", model_type)
    readers = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}
    if model_type not in readers:
        raise _NotComputedError(f"a text model of type {model_type!r}")
    return readers[model_type](keys)


def _qkv(base: Architecture, name: str) -> Fused:
    return _concatenated(
        name,
        ("self_attn.q_proj", base.heads * base.head_dim),
        ("self_attn.k_proj", base.kv_heads * base.head_dim),
        ("self_attn.v_proj", base.kv_heads * base.head_dim),
    )


def _gate_up(base: Architecture) -> Fused:
    return _concatenated("mlp.gate_up_proj", ("mlp.gate_proj", base.inner), ("mlp.up_proj", base.inner))


def _concatenated(name: str, *parts: tuple[str, int]) -> Fused:
    start, ranges = 0, []
    for part, width in parts:
        ranges.append((part, (range(start, start + width),)))
        start += width
    return Fused(name, tuple(ranges))


_READERS: dict[str, Callable[[_Keys], Architecture]] = {
    "CohereForCausalLM": _cohere,
    "Cohere2ForCausalLM": _cohere2,
    "DbrxForCausalLM": _dbrx,
    "GPT2LMHeadModel": _gpt2,
    "GPTBigCodeForCausalLM": _gpt_bigcode,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Glm4ForCausalLM": _glm4,
    "GraniteForCausalLM": _granite,
    "IndexForCausalLM": _index,
    "InternLM2ForCausalLM": _internlm2,
    "LlamaForCausalLM": _llama,
    "LlavaForConditionalGeneration": _multimodal,
    "MiniCPMForCausalLM": _minicpm,
    "Mistral3ForConditionalGeneration": _multimodal,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "OrionForCausalLM": _orion,
    "Phi3ForCausalLM": _phi3,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_vl,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Starcoder2ForCausalLM": _starcoder2,
    "YiForCausalLM": _yi,
}

# --- rejecting what we do not implement ---------------------------------------------------------------------------

# An unread key that contains one of these may change the computation, and is refused. Other keys concern tokens,
# training, files or other programs.
_COMPUTING = re.compile(
    r"act|alibi|attention|attn|bias|cap|clip|expert|factor|head|kernel|layer|logit|mamba|mlp|moe|mtp|multiplier|norm"
    r"|parallel|pattern|position|pre_|proj|qk|query|residual|rope|rotary|router|scal|shared|sliding|softcap|sparse|ssm"
    r"|state|temperature|topk|top_k|window"
)
# Exceptions: keys that do not affect text inference.
_HARMLESS = re.compile(
    r"dropout|pdrop|initializer|jitter|aux_loss|loss|cache|chunk_size_feed|output_|_implementation|flash|fp32_attention"
    r"|softmax_in_fp32|upcast_attn|z3|torch|quantization|problem_type|pruned|task_specific|auto_map|architectures"
    r"|max_position_embeddings|pretraining_tp|is_|use_bfloat16|label|vision|image|video|projector|token|mrope|summary"
    r"|model_max_length|num_nextn|num_mtp|cross_attention_hidden|position_embedding_type|use_parallel_embedding"
    r"|head_dim|n_positions|n_ctx|num_logits_to_keep|rescale_layer|text_config|_name|calculate|unsloth|transformers"
)
_INERT: tuple[Any, ...] = (None, False, 0, 1, "", [], {})


def _refuse_unread(keys: _Keys) -> None:
    if keys.text.get("use_sliding_window") is False or keys.text.get("sliding_window") is None:
        keys.read.update(("use_sliding_window", "sliding_window", "max_window_layers"))
    for name, value in keys.text.items():
        if name in keys.read or name.startswith("_") or (value is not True and value in _INERT):
            continue
        if (
            _HARMLESS.search(name)
            or not _COMPUTING.search(name)
            or (name == "layer_types" and value == [FULL] * len(value))
        ):
            continue
        shown = repr(value) if not isinstance(value, (dict, list)) else "…"
        raise _NotComputedError(f"config.json's {name} ({shown[:40]})")


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.([a-z_]+)$")
_OTHER_PARTS = re.compile(r"vision|visual|multi_modal|projector|patch_merger|image_|audio")
# Buffers in older checkpoints; no weights.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(?:bias|masked_bias)$|_scale$")
_PREFIXES = (
    (re.compile(r"^model\.language_model\.(?:model\.)?"), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model."),
)


def llama_name(name: str, architecture: Architecture) -> str | None:
    """A tensor's name in Llama's naming; None for a buffer or a tensor outside the text model."""
    if _OTHER_PARTS.search(name) or (_BUFFERS.search(name) and not name.endswith(".q_scale")):
        return None
    for pattern, prefix in _PREFIXES:
        name = pattern.sub(prefix, name)
    for old, new in architecture.names:
        name = re.sub(old, new, name)
    return name


def _refuse_unknown_tensors(info: ModelInfo, architecture: Architecture) -> None:
    """Refuse weights inside a layer that the forward pass would silently ignore."""
    known = {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj",
        *(name for name in architecture.norms if name), *(fused.name for fused in architecture.fused),
    }  # fmt: skip
    if architecture.gated:
        known.add("mlp.gate_proj")
    if architecture.head_norm:
        known.update(("self_attn.q_norm", "self_attn.k_norm"))
    expert = re.compile(r"mlp\.(?:gate|experts\.\d+\.(?:gate|up|down)_proj)$")
    for tensor in info.tensors:
        name = llama_name(tensor, architecture)
        match = _LAYER.match(name) if name else None
        if not match or int(match[1]) >= architecture.layers or match[2] in known:
            continue
        if architecture.experts is None or not expert.match(match[2]):
            raise _NotComputedError(f"the tensor {tensor}")
