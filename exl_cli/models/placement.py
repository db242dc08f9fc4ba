"""Whether a model fits the GPUs, and which of its layers go where.

A model that fits on one GPU stays on one. Otherwise it goes on as few GPUs as possible, each filled to the same
proportion of its free memory: weights, KV cache, scratch, graphs and activations included (`memory.Parts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exl_cli.errors import OutOfMemoryError, UsageError, param
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import CacheType
from exl_cli.models.memory import CUDA_CONTEXT, PAGE, Estimate, Parts, estimate, round_up
from exl_cli.system.units import GIB, gib

_OTHERS = "see what else uses the GPU with nvidia-smi"


@dataclass(frozen=True)
class Share:
    """A GPU's part of a model.

    Attributes:
        gpu: the GPU's index.
        layers: its transformer layers; the share with the last layer has the head.
        allocated: bytes that its allocator will reserve.
        weights: bytes of weights.
    """

    gpu: int
    layers: range
    allocated: int
    weights: int


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
        return needed is not None and split(needed, free) is not None

    return _most(fits, max(1, info.extended_length // PAGE)) * PAGE


def _most(fits: Callable[[int], bool], high: int) -> int:
    """The largest count up to `high` that fits, by bisection; 0 if none does."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def described(shares: Sequence[Share], room: Sequence[int]) -> str:
    """What each GPU holds, in words, beside the bytes that it has for it."""
    return "; ".join(
        f"GPU {share.gpu}: layers {share.layers.start} to {share.layers.stop - 1}, "
        f"{gib(share.allocated)} of {gib(room[share.gpu])}"
        for share in shares
    )


def split(needed: Estimate, free: Sequence[int], sizes: Sequence[float] | None = None) -> list[Share] | None:
    """Place a model on as few GPUs as possible, filled alike; None if it does not fit.

    Args:
        needed: the model's estimate.
        free: free bytes on each GPU, after the CUDA context.
        sizes: GiB of weights for each GPU, instead.
    """
    parts = needed.parts
    if sizes is not None:
        asked = _by_weights(parts, sizes) if len(sizes) <= len(free) else []
        return asked if asked and all(share.allocated <= free[share.gpu] for share in asked) else None
    for gpu, room in enumerate(free):
        if needed.allocated <= room:
            return [Share(gpu, range(len(parts.layers)), needed.allocated, needed.weights)]
    for count in range(2, len(free) + 1):
        for chosen in itertools.combinations(range(len(free)), count):
            if shares := _even(parts, chosen, free):
                return shares
    return None


def _even(parts: Parts, gpus: Sequence[int], free: Sequence[int]) -> list[Share] | None:
    """Place a model on these GPUs with the smallest proportion of their free memory; None if one would hold nothing."""

    def filled(thousandths: int) -> list[Share]:
        shares, first = [], 0
        for gpu in gpus:
            layers = parts.most(first, free[gpu] * thousandths // 1000)
            shares.append(_share(parts, gpu, layers))
            first = layers.stop
        return shares if first == len(parts.layers) and all(share.layers for share in shares) else []

    low, high = 0, 1000
    if not filled(high):
        # A last GPU that is left empty: fewer GPUs do.
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(middle) else (middle, high)
    return filled(high)


def _share(parts: Parts, gpu: int, layers: range) -> Share:
    return Share(gpu, layers, parts.of(layers), parts.weights_of(layers))


def _split_as_asked(needed: Estimate, sizes: Sequence[float], free: Sequence[int], name: str) -> list[Share]:
    """Place a model by GiB of weights per GPU, in order.

    Args:
        needed: the model's estimate.
        sizes: GiB of weights for each GPU.
        free: free bytes on each GPU, after the CUDA context.
        name: the model's, for messages.

    Raises:
        UsageError: more sizes than GPUs, or the weights are more than the sizes.
        OutOfMemoryError: a GPU has not enough memory for its part.
    """
    given = f"{param('gpu_split')} {','.join(f'{size:g}' for size in sizes)}"
    if len(sizes) > len(free):
        raise UsageError(
            f"{given} is for {len(sizes)} GPUs, but this machine has {len(free)}", "give one number for each GPU"
        )
    shares = _by_weights(needed.parts, sizes)
    if not shares:
        raise UsageError(
            f"{name} does not fit {given}: its weights take {gib(needed.weights)}",
            f"raise the numbers (GiB of weights per GPU), or use {param('gpu_split')} auto",
        )
    problems = [
        f"GPU {share.gpu} has {gib(free[share.gpu])} free but needs {gib(share.allocated)} "
        f"({gib(share.weights)} of weights)"
        for share in shares
        if share.allocated > free[share.gpu]
    ]
    if problems:
        raise OutOfMemoryError(f"{name} does not fit {given}: {'; '.join(problems)}", _better_split(needed, free))
    return shares


def _by_weights(parts: Parts, sizes: Sequence[float]) -> list[Share]:
    """Fill each GPU with layers up to this many GiB of weights; empty if layers are left over."""
    shares, first, count = [], 0, len(parts.layers)
    for gpu, size in enumerate(sizes):
        stop = first
        while stop < count and parts.weights_of(range(first, stop + 1)) <= size * GIB:
            stop += 1
        if stop > first:
            shares.append(_share(parts, gpu, range(first, stop)))
            first = stop
    return shares if first == count else []


def _better_split(needed: Estimate, free: Sequence[int]) -> str:
    shares = split(needed, free)
    if shares is None:
        return f"no split fits: use {param('cache')} q4, a smaller {param('max_seq_len')} or a smaller quantization"
    weights = {share.gpu: share.weights for share in shares}
    # Rounded up, so that the layers fit; the last number may be generous.
    sizes = [math.ceil(weights.get(gpu, 0) / GIB * 10) / 10 for gpu in range(max(weights) + 1)]
    if len(shares) > 1 and [share.layers for share in _by_weights(needed.parts, sizes)] == [s.layers for s in shares]:
        return f"{param('gpu_split')} {','.join(f'{size:g}' for size in sizes)} fits; {_OTHERS}"
    return f"{param('gpu_split')} auto fits; {_OTHERS}"


def fits(needed: Estimate, cards: Sequence[int]) -> bool:
    """Whether an estimate fits GPUs with these free bytes, before any CUDA context exists."""
    return split(needed, [card - CUDA_CONTEXT for card in cards]) is not None


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
    largest = max(range(len(free)), key=free.__getitem__)
    return [count - taken if gpu == largest else count for gpu, count in enumerate(free)]


def place(
    info: ModelInfo,
    context: int,
    cache: CacheType,
    free: Sequence[int],
    *,
    low_mem: bool = False,
    draft: ModelInfo | None = None,
    sequences: int = 1,
    sizes: Sequence[float] | None = None,
) -> list[Share] | None:
    """Place a model on the GPUs, or raise an error with advice.

    Args:
        info: the model.
        context: tokens of context.
        cache: KV cache type.
        free: free bytes on each GPU from torch.cuda.mem_get_info, so after the CUDA context.
        low_mem: see `estimate`.
        draft: the draft model to be loaded too.
        sequences: contexts of that length that the KV cache has room for.
        sizes: GiB of weights for each GPU; None for `split`.

    Returns:
        The share of each GPU used; None if the memory cannot be estimated.

    Raises:
        OutOfMemoryError: with the memory needed, the memory free, and what would fit.
        UsageError: the sizes are not for this model or these GPUs.
    """
    needed = estimate(info, round_up(context) * sequences, cache, low_mem=low_mem)
    have = f"{gib(sum(free))} is free"
    if len(free) > 1:
        have += f" on {len(free)} GPUs ({' + '.join(map(gib, free))})"
    if draft is not None and free:
        taken = beside(draft, context, cache, low_mem=low_mem, sequences=sequences)
        free = less(free, taken)
        have += f", of which the draft model takes {gib(taken)}"
    if needed is None:
        return None
    if sizes is not None:
        return _split_as_asked(needed, sizes, free, info.name)
    if shares := split(needed, free):
        return shares
    whole = f"a context of {context:,} tokens" if sequences == 1 else f"{sequences} contexts of {context:,} tokens"
    message = (
        f"{info.name} needs about {gib(needed.allocated)} of GPU memory for {whole} with {cache} cache, but {have}"
    )
    free = tuple(free)

    def fits(count: int) -> bool:
        fewer = estimate(info, round_up(context) * count, cache, low_mem=low_mem)
        return fewer is not None and split(fewer, free) is not None

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
