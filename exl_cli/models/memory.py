"""How much GPU memory a model takes on exllamav2, estimated before it is loaded, and the GPUs that there are.

The sum follows exllamav2 0.3.2 (file names are its own) at the moment when it holds most:

- weights: every tensor of the text model but the embeddings, which stay on the CPU (`embedding.py`); unquantized ones
  as float16 (`module.py`, `load_weight`); a head tied to the embeddings is loaded as a separate float16 matrix;
- KV cache: keys and values of every layer for every token, the context rounded up to a page of 256. A quantized cache
  stores blocks of 32 values with a float16 scale, and keeps one layer of float16 to compute with (`cache.py`);
- scratch: one buffer per GPU, as large as the hungriest module's `scratch_space_fixed`, and its size does not depend on
  the context but on the prompt chunk of 2,048 tokens (1,024 with `low_mem`); only quantized modules need it;
- working memory: while loading, `load_autosplit` holds back 448 MiB and sends a full chunk through every layer up to
  the logits. Running takes less: attention needs no memory that grows with the context, CUDA graphs some megabytes.
  With it counts the one page of the cache that is nobody's (`engines/exllamav2/forward.py`);
- the CUDA context and kernels of torch and exllamav2, and what torch's allocator loses by rounding.

`tests/gpu/estimate_against_peak.py` compares it with measured peaks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exl_cli.errors import OutOfMemoryError, param
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import CacheType
from exl_cli.models.rope import Rope
from exl_cli.system.nvml import Driver, open_driver
from exl_cli.system.units import MIB, gib

PAGE = 256
CACHE_TYPES: tuple[CacheType, ...] = ("fp16", "q8", "q6", "q4")

# Bits per stored value, scales included; q6 keeps keys at 8 bits and values at 4.
CACHE_BITS: dict[str, float] = {"fp16": 16, "q8": 8.5, "q6": 6.5, "q4": 4.5}
_CHUNK, _CHUNK_LOW_MEM = 2048, 1024
_LARGEST_DEQUANTIZED = 512 * MIB
_HELD_BACK, _HELD_BACK_LATER = (192 + 256) * MIB, (64 + 256) * MIB
_CUDA_CONTEXT = 512 * MIB
_ROUNDING = 0.03

# Parts of multimodal checkpoints that the text model does without.
_OTHER_PARTS = ("vision_", "visual.", "multi_modal_projector", "patch_merger", "image_")
_HEADS = ("lm_head.weight", "lm_head.q_weight", "lm_head.qweight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Estimate:
    """GPU memory in bytes, by what it is for; see the module's first lines."""

    weights: int
    cache: int
    scratch: int
    working: int
    rounding: int
    cuda: int

    @property
    def allocated(self) -> int:
        """All but the CUDA context: what torch's allocator will ask for."""
        return self.weights + self.cache + self.scratch + self.working + self.rounding

    @property
    def total(self) -> int:
        """All of it: what the card must have free before the program starts."""
        return self.allocated + self.cuda


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine, in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Shape:
    """A model's dimensions; `inner` is the MLP's (one expert's, where there are several)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim


def shape_of(info: ModelInfo) -> Shape | None:
    """The dimensions under the names that exllamav2 looks for; None where config.json does not say."""

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
    # GPTBigCode's name for one key head that all queries share.
    kv_heads = 1 if info.text_config("multi_query") is True else read("num_key_value_heads", "kv_n_heads") or heads
    return Shape(layers, hidden, heads, kv_heads, head_dim, inner, vocabulary)


def round_up(tokens: int) -> int:
    """The context that is really allocated: whole pages."""
    return -(-tokens // PAGE) * PAGE


def estimate(info: ModelInfo, context: int, cache: CacheType = "fp16", *, low_mem: bool = False) -> Estimate | None:
    """GPU memory of a model on one GPU.

    Args:
        info: the model; without `tensors` (a branch that is not here) its `size_bytes` stands for them.
        context: tokens to allocate.
        cache: type of the KV cache.
        low_mem: prompts in smaller chunks.

    Returns:
        None where config.json does not give the model's dimensions.
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
    working = _working(shape, rows, cache) + _rotary(info, shape, context)
    return Estimate(weights, cached, scratch, working, rounding, _CUDA_CONTEXT)


def _weights(info: ModelInfo, shape: Shape) -> int:
    matrix = 2 * shape.vocabulary * shape.hidden
    tied = bool(info.text_config("tie_word_embeddings"))
    if not info.tensors:
        # Unquantized weights become float16, whatever they were stored as. EXL2 files always hold a quantized head;
        # others leave a tied one out.
        wide = info.bits_per_weight / 16 if info.format == "float" and info.bits_per_weight > 16 else 1
        return max(0, round(info.size_bytes / wide) - matrix) + (matrix if tied and info.format != "exl2" else 0)
    total, head = 0, False
    for tensor in info.tensors.values():
        if tensor.name.endswith(_EMBEDDINGS) or any(part in tensor.name for part in _OTHER_PARTS):
            continue
        # InternLM's head is called output; attention's own output has a longer name.
        head = head or tensor.name == "output.weight" or tensor.name.endswith(_HEADS)
        total += 2 * tensor.numel if tensor.dtype in ("F32", "BF16") else tensor.nbytes
    return total if head else total + matrix


def _cache(shape: Shape, context: int, cache: CacheType) -> int:
    values = 2 * shape.keys * context
    layer = 0 if cache == "fp16" else 2 * values
    return math.ceil(shape.layers * values * CACHE_BITS[cache] / 8) + layer


def _scratch(shape: Shape, rows: int) -> int:
    def dequantized(inputs: int, outputs: int) -> int:
        return 2 * min(inputs * outputs, _LARGEST_DEQUANTIZED)

    attention = 2 * rows * max(shape.queries, shape.hidden) + dequantized(shape.hidden, shape.queries)
    widest = max(shape.hidden, shape.inner)
    mlp = 2 * rows * (shape.hidden + 2 * widest) + dequantized(shape.hidden, shape.inner)
    return max(attention, mlp, dequantized(shape.hidden, shape.vocabulary))


def _working(shape: Shape, rows: int, cache: CacheType) -> int:
    # Hidden states in and out of a layer, queries, attention's output, keys and values.
    layer = 2 * rows * (4 * shape.hidden + 3 * shape.queries + 2 * shape.keys)
    return _HELD_BACK + layer + 2 * rows * shape.vocabulary + _cache(shape, PAGE, cache)


def _rotary(info: ModelInfo, shape: Shape, context: int) -> int:
    """Sines and cosines in float16 for sequences that a "dynamic" rope extends, see `Rope.switches`."""
    given = info.text_config("rope_parameters") or info.text_config("rope_scaling")
    if not isinstance(given, dict) or given.get("rope_type", given.get("type")) != "dynamic":
        return 0
    longest = info.context_length
    rope = Rope("dynamic", 1.0, shape.head_dim, longest, longest, {})
    return 2 * 2 * shape.head_dim * sum(rope.switches(context))


def largest_context(info: ModelInfo, free: Sequence[int], cache: CacheType = "fp16", *, low_mem: bool = False) -> int:
    """The most tokens of context, in whole pages and at most what the model was made for, that fit.

    Args:
        info: the model.
        free: bytes free on each GPU, the CUDA context not among them.
        cache: type of the KV cache.
        low_mem: see `estimate`.

    Returns:
        0 where not even one page fits.
    """

    def fits(pages: int) -> bool:
        needed = estimate(info, pages * PAGE, cache, low_mem=low_mem)
        return needed is not None and needed.allocated <= usable(needed, free)

    low, high = 0, max(1, info.extended_length // PAGE)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * PAGE


def usable(needed: Estimate, free: Sequence[int]) -> int:
    """How much of the GPUs' free bytes serves weights, cache and work: each after the first needs its own scratch."""
    each = needed.scratch + _HELD_BACK_LATER
    largest = sorted(free, reverse=True)
    return sum(largest[:1]) + sum(max(0, count - each) for count in largest[1:])


def fits(needed: Estimate, cards: Sequence[int]) -> bool:
    """Whether that fits cards of so many bytes, each of which a CUDA context takes its part of."""
    return needed.allocated <= usable(needed, [card - _CUDA_CONTEXT for card in cards])


def beside(draft: ModelInfo, context: int, cache: CacheType = "fp16", *, low_mem: bool = False) -> int:
    """GPU memory in bytes that a draft model takes beside the model: one works while the other waits.

    Args:
        draft: the smaller model.
        context: tokens to allocate, of which it uses as many as it was made for.
        cache, low_mem: see `estimate`.
    """
    needed = estimate(draft, min(context, draft.extended_length), cache, low_mem=low_mem)
    return 0 if needed is None else needed.allocated - needed.working


def check(
    info: ModelInfo,
    context: int,
    cache: CacheType,
    free: Sequence[int],
    *,
    low_mem: bool = False,
    draft: ModelInfo | None = None,
) -> Estimate | None:
    """Refuse to load what will not fit.

    Args:
        info: the model.
        context: tokens to allocate.
        cache: type of the KV cache.
        free: bytes free on each GPU as torch.cuda.mem_get_info tells them, which no longer count the CUDA context.
        low_mem: see `estimate`.
        draft: a model that is to be loaded as well.

    Returns:
        The estimate, without the draft's; None where none can be made, and nothing is refused.

    Raises:
        OutOfMemoryError: with need, free and the largest context that fits.
    """
    needed = estimate(info, context, cache, low_mem=low_mem)
    have = f"{gib(sum(free))} {'are' if len(free) < 2 else f'on {len(free)} GPUs are'} free"
    if draft is not None and free:
        taken = beside(draft, context, cache, low_mem=low_mem)
        largest = max(free)
        free = [largest - taken, *sorted(free)[:-1]]
        have += f", of which the draft model takes {gib(taken)}"
    if needed is None or needed.allocated <= usable(needed, free):
        return needed
    message = (
        f"{info.name} needs about {gib(needed.allocated)} of GPU memory for a context of {context:,} tokens "
        f"with {cache} cache, and {have}"
    )
    raise OutOfMemoryError(message, _advice(info, context, cache, free, low_mem))


def _advice(info: ModelInfo, context: int, cache: CacheType, free: Sequence[int], low_mem: bool) -> str:
    fitting = {kind: largest_context(info, free, kind, low_mem=low_mem) for kind in (cache, "q4")}
    ways = []
    if fitting[cache]:
        ways.append(f"{param('max_seq_len')} {fitting[cache]} is the largest context that fits")
    if fitting["q4"] > fitting[cache]:
        ways.append(f"{param('cache')} q4 fits {min(fitting['q4'], max(context, fitting[cache])):,} tokens")
    if not ways:
        ways.append("no context fits: take a smaller quantization (exl download owner/name --branches)")
    return "; ".join([*ways, "nvidia-smi shows who uses the GPU"])


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that a program started now would see; empty where there is none, or no driver to ask."""
    with open_driver() as driver:
        handles = _visible(driver)
        asked = [(driver.ask("DeviceGetName", handle), driver.ask("DeviceGetMemoryInfo", handle)) for handle in handles]
    return [Gpu(str(name), int(memory.total), int(memory.free)) for name, memory in asked if memory is not None]


def _visible(driver: Driver) -> list[Any]:
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, by number or by the beginning of a UUID."""
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
