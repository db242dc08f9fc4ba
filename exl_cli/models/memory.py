"""Estimate the GPU memory of a model on exllamav2 before loading it, and list the GPUs.

The estimate follows exllamav2 0.3.2 (whose files are named below) at its peak:

- weights: all tensors of the text model except the embeddings, which stay on the CPU (`embedding.py`). Unquantized
  weights become float16 (`module.py`, `load_weight`); a head tied to the embeddings is a separate float16 matrix.
- KV cache: keys and values for every layer and token, the context rounded up to whole pages of 256 tokens. A quantized
  cache stores blocks of 32 values with a float16 scale, plus one layer in float16 to compute with (`cache.py`).
- scratch: one buffer per GPU, the maximum of the modules' `scratch_space_fixed`. It depends on the prefill chunk of
  2,048 tokens (1,024 with `low_mem`), not on the context, and only quantized modules need it.
- working memory: while loading, 448 MiB are held back and a full chunk runs through all layers to the logits
  (`engines/exllamav2/build_model.py`). Inference takes less, unless the context is short and the vocabulary large:
  activations of a chunk, rows of up to 512 tokens for each of their experts (`engines/exllamav2/mixtures.py`), and
  buffers to decode `MOST_SEQUENCES` at once, whatever `sequences` is. Attention memory does not grow with the context,
  CUDA graphs take a few megabytes. The spare page of the KV cache (`engines/exllamav2/inputs.py`) is counted here.
- the CUDA context with the kernels of torch and exllamav2, and the rounding of torch's allocator.

Over several GPUs, each holds whole layers with their part of the KV cache, and its own scratch, activations, graphs and
reserve; the last one has the head and the logits as well. `placement` decides which layers go where.

`tests/gpu/estimate_against_peak.py` compares the estimate with measured peaks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import CacheType
from exl_cli.models.rope import Rope
from exl_cli.system.nvml import open_driver
from exl_cli.system.units import MIB
from exl_cli.system.visible_gpus import visible_gpus

PAGE = 256
# Sequences of one forward pass; the kernels may take fewer.
MOST_SEQUENCES = 256
CACHE_TYPES: tuple[CacheType, ...] = ("fp16", "q8", "q6", "q4")

# Bits per cached value, including a float16 scale per 32 values; q6 is 8-bit keys and 4-bit values.
CACHE_BITS: dict[str, float] = {"fp16": 16, "q8": 8.5, "q6": 6.5, "q4": 4.5}
_CHUNK, _CHUNK_LOW_MEM = 2048, 1024
# Tokens that a mixture of experts computes at once.
_EXPERT_ROWS = 512
_LARGEST_DEQUANTIZED = 512 * MIB
# Bytes of each GPU that loading leaves to CUDA graphs, kernels and buffers.
HELD_BACK = 448 * MIB
CUDA_CONTEXT = 512 * MIB
_ROUNDING = 0.03

# Tensors of multimodal checkpoints that are not part of the text model.
_OTHER_PARTS = ("vision_", "visual.", "multi_modal_projector", "patch_merger", "image_")
_HEADS = ("lm_head.weight", "lm_head.q_weight", "lm_head.qweight")
# A tensor's layer: the first number in its name, as in "model.layers.7.mlp.experts.3.w1.weight".
_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Parts:
    """An estimate by place, in bytes, for a model over several GPUs.

    Attributes:
        layers: weights of each transformer layer.
        head: weights behind the last layer.
        cache: KV cache of a layer.
        each: what every GPU needs in addition to its layers, scratch included.
        last: what only the last GPU needs: the logits of a chunk.
    """

    layers: tuple[int, ...]
    head: int
    cache: int
    each: int
    last: int

    def of(self, layers: range) -> int:
        """Bytes that the allocator of a GPU with these layers will reserve."""
        return self._allocated(sum(self.layers[layers.start : layers.stop]), layers)

    def _allocated(self, weights: int, layers: range) -> int:
        last = layers.stop == len(self.layers)
        stays = weights + len(layers) * self.cache + (self.head if last else 0)
        return round((1 + _ROUNDING) * stays) + self.each + (self.last if last else 0)

    def most(self, first: int, room: int) -> range:
        """The layers from `first` on that fit this room, all with the head or else none of the last."""
        weights, stop = 0, first
        for index in range(first, len(self.layers)):
            weights += self.layers[index]
            if self._allocated(weights, range(first, index + 1)) > room:
                break
            stop = index + 1
        return range(first, stop)

    def weights_of(self, layers: range) -> int:
        """Bytes of weights of a GPU with these layers."""
        head = self.head if layers.stop == len(self.layers) else 0
        return sum(self.layers[layers.start : layers.stop]) + head


@dataclass(frozen=True)
class Estimate:
    """GPU memory in bytes by purpose; see the module docstring. `parts` is the same by place."""

    weights: int
    cache: int
    scratch: int
    working: int
    rounding: int
    cuda: int
    parts: Parts = field(repr=False)

    @property
    def allocated(self) -> int:
        """Bytes that torch's allocator will reserve: all but the CUDA context."""
        return self.weights + self.cache + self.scratch + self.working + self.rounding

    @property
    def total(self) -> int:
        """Bytes that must be free before the process starts."""
        return self.allocated + self.cuda


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Shape:
    """A model's dimensions.

    Attributes:
        inner: the intermediate size of the MLP, or of one expert.
        chosen: experts that each token is routed to; 0 without experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    chosen: int = 0

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


def shape_of(info: ModelInfo) -> Shape | None:
    """Read the dimensions under any of exllamav2's key names; None if config.json lacks one."""

    def read(*names: str) -> int:
        values = (info.text_config(name) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), 0)

    layers = read("num_hidden_layers", "n_layers", "n_layer")
    hidden = read("hidden_size", "d_model", "n_embd")
    heads = read("num_attention_heads", "n_heads", "n_head")
    vocabulary = read("vocab_size")
    if not (layers and hidden and heads and vocabulary):
        return None
    inner = read("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden
    head_dim = read("head_dim") or hidden // heads
    # multi_query: GPTBigCode, one key-value head for all queries.
    kv_heads = 1 if info.text_config("multi_query") is True else read("num_key_value_heads", "kv_n_heads") or heads
    return Shape(layers, hidden, heads, kv_heads, head_dim, inner, vocabulary, read("num_experts_per_tok"))


def round_up(tokens: int) -> int:
    """Round a context length up to whole pages."""
    return -(-tokens // PAGE) * PAGE


def estimate(info: ModelInfo, context: int, cache: CacheType = "fp16", *, low_mem: bool = False) -> Estimate | None:
    """Estimate the memory of a model on one GPU.

    Args:
        info: the model. If `tensors` is empty, as for a branch not downloaded yet, `size_bytes` is used.
        context: tokens of KV cache.
        cache: KV cache type.
        low_mem: smaller prefill chunks.

    Returns:
        None if config.json does not give the model's dimensions.
    """
    shape = shape_of(info)
    if shape is None:
        return None
    context = round_up(context)
    rows = min(_CHUNK_LOW_MEM if low_mem else _CHUNK, context)
    layers, head = _weights(info, shape)
    weights = sum(layers) + head
    cached = _cache(shape, context, cache)
    scratch = _scratch(shape, rows) if info.format != "float" else 0
    rounding = round(_ROUNDING * (weights + cached))
    longest = min(context, info.extended_length)
    activations, rotary = _activations(shape, rows), _rotary(info, shape, context)
    reserve, logits = HELD_BACK + 2 * rows * shape.vocabulary, MOST_SEQUENCES * _decoding(shape, longest)
    working = activations + max(reserve, logits) + _cache(shape, PAGE, cache) + rotary
    tokens = context + PAGE
    parts = Parts(
        layers=tuple(layers),
        head=head,
        cache=_cached_layer(shape, tokens, cache),
        each=scratch + activations + rotary + HELD_BACK + _dequantized_layer(shape, tokens, cache),
        last=max(reserve, logits) - HELD_BACK,
    )
    return Estimate(weights, cached, scratch, working, rounding, CUDA_CONTEXT, parts)


def _weights(info: ModelInfo, shape: Shape) -> tuple[list[int], int]:
    """Bytes of each layer's weights, and of the head with all that belongs to no layer."""
    matrix = 2 * shape.vocabulary * shape.hidden
    tied = bool(info.text_config("tie_word_embeddings"))
    if not info.tensors:
        # Unquantized weights become float16. EXL2 files always contain a head; other formats omit a tied one.
        wide = info.bits_per_weight / 16 if info.format == "float" and info.bits_per_weight > 16 else 1
        made = matrix if tied and info.format != "exl2" else 0
        stored = max(0, round(info.size_bytes / wide) - matrix)
        head = made or min(stored, round(matrix * min(info.head_bits or info.bits_per_weight or 16, 16) / 16))
        each, rest = divmod(stored + made - head, shape.layers)
        return [each] * shape.layers, head + rest
    layers, others, head = [0] * shape.layers, 0, False
    for tensor in info.tensors.values():
        if tensor.name.endswith(_EMBEDDINGS) or any(part in tensor.name for part in _OTHER_PARTS):
            continue
        # InternLM 2 names its head output.weight; attention outputs have longer names.
        head = head or tensor.name == "output.weight" or tensor.name.endswith(_HEADS)
        count = 2 * tensor.numel if tensor.dtype in ("F32", "BF16") else tensor.nbytes
        layer = _LAYER.search(tensor.name)
        if layer and int(layer[1]) < len(layers):
            layers[int(layer[1])] += count
        else:
            others += count
    return layers, others if head else others + matrix


def _cache(shape: Shape, context: int, cache: CacheType) -> int:
    return shape.layers * _cached_layer(shape, context, cache) + _dequantized_layer(shape, context, cache)


def _cached_layer(shape: Shape, context: int, cache: CacheType) -> int:
    return math.ceil(2 * shape.keys * context * CACHE_BITS[cache] / 8)  # keys and values


def _dequantized_layer(shape: Shape, context: int, cache: CacheType) -> int:
    """Bytes of one layer's keys and values in float16, for a quantized cache to compute with."""
    return 0 if cache == "fp16" else 2 * 2 * shape.keys * context


def _scratch(shape: Shape, rows: int) -> int:
    def dequantized(inputs: int, outputs: int) -> int:
        return 2 * min(inputs * outputs, _LARGEST_DEQUANTIZED)

    attention = 2 * rows * max(shape.queries, shape.hidden) + dequantized(shape.hidden, shape.queries)
    widest = max(shape.hidden, shape.inner)
    mlp = 2 * rows * (shape.hidden + 2 * widest) + dequantized(shape.hidden, shape.inner)
    return max(attention, mlp, dequantized(shape.hidden, shape.vocabulary))


def _activations(shape: Shape, rows: int) -> int:
    # A layer's hidden states before and after, queries, attention output, keys and values, all float16.
    dense = rows * (4 * shape.hidden + 3 * shape.queries + 2 * shape.keys)
    # Each expert's input rows, in two orders, and the rows between its matrices.
    return 2 * (dense + _EXPERT_ROWS * shape.chosen * (2 * shape.hidden + shape.inner))


def _decoding(shape: Shape, longest: int) -> int:
    """Bytes for each sequence of a decode step."""
    activations = 4 * shape.hidden + 2 * shape.queries + 2 * shape.keys + shape.inner  # float16
    # Logits in float16 and float32, the sampler's two float32 numbers for each, and the tokens so far.
    return 2 * activations + (2 + 4 + 8) * shape.vocabulary + 4 * longest


def _rotary(info: ModelInfo, shape: Shape, context: int) -> int:
    """Bytes of the float16 sine and cosine tables of "dynamic" RoPE scaling; see `Rope.switches`."""
    given = info.text_config("rope_parameters") or info.text_config("rope_scaling")
    if not isinstance(given, dict) or given.get("rope_type", given.get("type")) != "dynamic":
        return 0
    longest = info.context_length
    rope = Rope("dynamic", 1.0, shape.head_dim, longest, longest, {})
    return 2 * 2 * shape.head_dim * sum(rope.switches(context))


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that a new process would see, in CUDA's order; empty without GPUs or a driver."""
    with open_driver() as driver:
        handles = visible_gpus(driver)
        asked = [(driver.ask("DeviceGetName", handle), driver.ask("DeviceGetMemoryInfo", handle)) for handle in handles]
    return [Gpu(str(name), int(memory.total), int(memory.free)) for name, memory in asked if memory is not None]
