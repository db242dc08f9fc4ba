"""Estimate the GPU memory of a model on exllamav2 before loading it, and list the GPUs.

The estimate follows exllamav2 0.3.2 (whose files are named below) at its peak:

- weights: all tensors of the text model except the embeddings, which stay on the CPU (`embedding.py`). Unquantized
  weights become float16 (`module.py`, `load_weight`); a head tied to the embeddings is a separate float16 matrix.
- KV cache: keys and values for every layer and token, the context rounded up to whole pages of 256 tokens. A quantized
  cache stores blocks of 32 values with a float16 scale, plus one layer in float16 to compute with (`cache.py`).
- scratch: one buffer per GPU, the maximum of the modules' `scratch_space_fixed`. It depends on the prefill chunk of
  2,048 tokens (1,024 with `low_mem`), not on the context, and only quantized modules need it.
- working memory: while loading, `load_autosplit` reserves 448 MiB and runs a full chunk through all layers to the
  logits. Inference takes less, unless the context is short and the vocabulary large: activations of a chunk, and
  buffers to decode `MOST_SEQUENCES` at once, whatever `sequences` is. Attention memory does not
  grow with the context, CUDA graphs take a few megabytes. The spare page of the KV cache
  (`engines/exllamav2/forward.py`) is counted here.
- the CUDA context with the kernels of torch and exllamav2, and the rounding of torch's allocator.

`tests/gpu/estimate_against_peak.py` compares the estimate with measured peaks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exl_cli.errors import OutOfMemoryError, param
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import CacheType
from exl_cli.models.rope import Rope
from exl_cli.system.nvml import Driver, open_driver
from exl_cli.system.units import MIB, gib

PAGE = 256
# Sequences of one forward pass; the kernels may take fewer.
MOST_SEQUENCES = 256
CACHE_TYPES: tuple[CacheType, ...] = ("fp16", "q8", "q6", "q4")

# Bits per cached value, including a float16 scale per 32 values; q6 is 8-bit keys and 4-bit values.
CACHE_BITS: dict[str, float] = {"fp16": 16, "q8": 8.5, "q6": 6.5, "q4": 4.5}
_CHUNK, _CHUNK_LOW_MEM = 2048, 1024
_LARGEST_DEQUANTIZED = 512 * MIB
_HELD_BACK, _HELD_BACK_LATER = (192 + 256) * MIB, (64 + 256) * MIB
_CUDA_CONTEXT = 512 * MIB
_ROUNDING = 0.03

# Tensors of multimodal checkpoints that are not part of the text model.
_OTHER_PARTS = ("vision_", "visual.", "multi_modal_projector", "patch_merger", "image_")
_HEADS = ("lm_head.weight", "lm_head.q_weight", "lm_head.qweight")
_OTHERS = "nvidia-smi shows what else uses the GPU"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Estimate:
    """GPU memory in bytes by purpose; see the module docstring."""

    weights: int
    cache: int
    scratch: int
    working: int
    rounding: int
    cuda: int

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
    """A model's dimensions; `inner` is the intermediate size of the MLP, or of one expert."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

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
    return Shape(layers, hidden, heads, kv_heads, head_dim, inner, vocabulary)


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
    weights = _weights(info, shape)
    cached = _cache(shape, context, cache)
    scratch = _scratch(shape, rows) if info.format != "float" else 0
    rounding = round(_ROUNDING * (weights + cached))
    longest = min(context, info.extended_length)
    working = _working(shape, rows, longest) + _cache(shape, PAGE, cache) + _rotary(info, shape, context)
    return Estimate(weights, cached, scratch, working, rounding, _CUDA_CONTEXT)


def _weights(info: ModelInfo, shape: Shape) -> int:
    matrix = 2 * shape.vocabulary * shape.hidden
    tied = bool(info.text_config("tie_word_embeddings"))
    if not info.tensors:
        # Unquantized weights become float16. EXL2 files always contain a head; other formats omit a tied one.
        wide = info.bits_per_weight / 16 if info.format == "float" and info.bits_per_weight > 16 else 1
        return max(0, round(info.size_bytes / wide) - matrix) + (matrix if tied and info.format != "exl2" else 0)
    total, head = 0, False
    for tensor in info.tensors.values():
        if tensor.name.endswith(_EMBEDDINGS) or any(part in tensor.name for part in _OTHER_PARTS):
            continue
        # InternLM 2 names its head output.weight; attention outputs have longer names.
        head = head or tensor.name == "output.weight" or tensor.name.endswith(_HEADS)
        total += 2 * tensor.numel if tensor.dtype in ("F32", "BF16") else tensor.nbytes
    return total if head else total + matrix


def _cache(shape: Shape, context: int, cache: CacheType) -> int:
    values = 2 * shape.keys * context  # keys and values of one layer
    layer = 0 if cache == "fp16" else 2 * values  # one layer dequantized to float16
    return math.ceil(shape.layers * values * CACHE_BITS[cache] / 8) + layer


def _scratch(shape: Shape, rows: int) -> int:
    def dequantized(inputs: int, outputs: int) -> int:
        return 2 * min(inputs * outputs, _LARGEST_DEQUANTIZED)

    attention = 2 * rows * max(shape.queries, shape.hidden) + dequantized(shape.hidden, shape.queries)
    widest = max(shape.hidden, shape.inner)
    mlp = 2 * rows * (shape.hidden + 2 * widest) + dequantized(shape.hidden, shape.inner)
    return max(attention, mlp, dequantized(shape.hidden, shape.vocabulary))


def _working(shape: Shape, rows: int, longest: int) -> int:
    # A layer's hidden states before and after, queries, attention output, keys and values, all float16.
    layer = 2 * rows * (4 * shape.hidden + 3 * shape.queries + 2 * shape.keys)
    return layer + max(_HELD_BACK + 2 * rows * shape.vocabulary, MOST_SEQUENCES * _decoding(shape, longest))


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


def largest_context(info: ModelInfo, free: Sequence[int], cache: CacheType = "fp16", *, low_mem: bool = False) -> int:
    """The largest context that fits, in tokens: whole pages, at most the model's context; 0 if nothing fits.

    Args:
        info: the model.
        free: free bytes on each GPU, after the CUDA context.
        cache: KV cache type.
        low_mem: see `estimate`.
    """

    def fits(pages: int) -> bool:
        needed = estimate(info, pages * PAGE, cache, low_mem=low_mem)
        return needed is not None and needed.allocated <= usable(needed, free)

    return _most(fits, max(1, info.extended_length // PAGE)) * PAGE


def _most(fits: Callable[[int], bool], high: int) -> int:
    """The largest count up to `high` that fits, by bisection; 0 if none does."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def usable(needed: Estimate, free: Sequence[int]) -> int:
    """Bytes usable for one model across GPUs: every GPU after the first needs its own scratch and load reserve."""
    each = needed.scratch + _HELD_BACK_LATER
    largest = sorted(free, reverse=True)
    return sum(largest[:1]) + sum(max(0, count - each) for count in largest[1:])


def fits(needed: Estimate, cards: Sequence[int]) -> bool:
    """Whether an estimate fits GPUs with these free bytes, before any CUDA context exists."""
    return needed.allocated <= usable(needed, [card - _CUDA_CONTEXT for card in cards])


def beside(
    draft: ModelInfo, context: int, cache: CacheType = "fp16", *, low_mem: bool = False, sequences: int = 1
) -> int:
    """Extra bytes for a draft model. The two models never run at once, so its working memory is not counted.

    Args:
        draft: the draft model.
        context: tokens of context, capped at the draft model's.
        cache, low_mem: see `estimate`.
        sequences: contexts of that length that the KV cache has room for.
    """
    tokens = round_up(min(context, draft.extended_length)) * sequences
    needed = estimate(draft, tokens, cache, low_mem=low_mem)
    return 0 if needed is None else needed.allocated - needed.working


def less(free: Sequence[int], taken: int) -> list[int]:
    """Free bytes on each GPU after the one with the most has given up some."""
    *others, largest = sorted(free)
    return [largest - taken, *others]


def check(
    info: ModelInfo,
    context: int,
    cache: CacheType,
    free: Sequence[int],
    *,
    low_mem: bool = False,
    draft: ModelInfo | None = None,
    sequences: int = 1,
) -> Estimate | None:
    """Raise OutOfMemoryError, with advice, if a model will not fit.

    Args:
        info: the model.
        context: tokens of context.
        cache: KV cache type.
        free: free bytes on each GPU from torch.cuda.mem_get_info, so after the CUDA context.
        low_mem: see `estimate`.
        draft: the draft model to be loaded too.
        sequences: contexts of that length that the KV cache has room for.

    Returns:
        The estimate without the draft model; None if none can be made.

    Raises:
        OutOfMemoryError: with the memory needed, the memory free, and the largest context that fits.
    """
    needed = estimate(info, round_up(context) * sequences, cache, low_mem=low_mem)
    have = f"{gib(sum(free))} {'are' if len(free) < 2 else f'on {len(free)} GPUs are'} free"
    if draft is not None and free:
        taken = beside(draft, context, cache, low_mem=low_mem, sequences=sequences)
        free = less(free, taken)
        have += f", of which the draft model takes {gib(taken)}"
    if needed is None or needed.allocated <= usable(needed, free):
        return needed
    whole = f"a context of {context:,} tokens" if sequences == 1 else f"{sequences} contexts of {context:,} tokens"
    message = (
        f"{info.name} needs about {gib(needed.allocated)} of GPU memory for {whole} with {cache} cache, and {have}"
    )
    free = tuple(free)

    def fits(count: int) -> bool:
        fewer = estimate(info, round_up(context) * count, cache, low_mem=low_mem)
        return fewer is not None and fewer.allocated <= usable(fewer, free)

    if most := _most(fits, sequences - 1):
        raise OutOfMemoryError(message, f"{param('sequences')} {most} is the most that fits; {_OTHERS}")
    raise OutOfMemoryError(message, _advice(info, context, cache, free, low_mem))


def _advice(info: ModelInfo, context: int, cache: CacheType, free: Sequence[int], low_mem: bool) -> str:
    fitting = {kind: largest_context(info, free, kind, low_mem=low_mem) for kind in (cache, "q4")}
    ways = []
    if fitting[cache]:
        ways.append(f"{param('max_seq_len')} {fitting[cache]} is the largest context that fits")
    if fitting["q4"] > fitting[cache]:
        ways.append(f"{param('cache')} q4 fits {min(fitting['q4'], max(context, fitting[cache])):,} tokens")
    if not ways:
        ways.append("no context fits: use a smaller quantization (exl download owner/name --branches)")
    return "; ".join([*ways, _OTHERS])


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that a new process would see; empty without GPUs or a driver."""
    with open_driver() as driver:
        handles = _visible(driver)
        asked = [(driver.ask("DeviceGetName", handle), driver.ask("DeviceGetMemoryInfo", handle)) for handle in handles]
    return [Gpu(str(name), int(memory.total), int(memory.free)) for name, memory in asked if memory is not None]


def _visible(driver: Driver) -> list[Any]:
    """Handles of the GPUs in CUDA_VISIBLE_DEVICES, which lists indices or prefixes of UUIDs."""
    handles = driver.gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return handles
    visible = []
    for entry in chosen.split(","):
        entry = entry.strip()
        if entry.isdigit() and int(entry) < len(handles):
            visible.append(handles[int(entry)])
        else:
            visible += [h for h in handles if entry and str(driver.ask("DeviceGetUUID", h)).startswith(entry)][:1]
    return visible
