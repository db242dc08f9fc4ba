"""Attention over a KV cache in pages: one function, on whichever implementation this machine has.

exllamav2 0.3.2 pages its cache only where flash-attn is installed, which few machines have. `install_paged` puts
`attend_paged` in the place of flash-attn's function there. The order of preference:

1. `flash-attn`, where it is installed and works;
2. `torch-varlen`, torch's own flash attention over pages: for prompts only, as with few queries it has too few
   programs to fill a GPU;
3. `triton`, our kernels: see `attention_kernels`;
4. `torch`: pages gathered, `causal_attention` on one sequence after the other. It reads the lengths back from the
   device, so that it cannot be captured in a CUDA graph.

An implementation works if it computes a small case correctly on this GPU. The environment variable EXL_ATTENTION
names the one to use instead. Where it is not set, models that run through kernels of our own attend from few tokens by
one of these, too (`kernels/attending.py`): in one launch with the rotary embedding it is faster than any of the above.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.attention.backends import DECODE_QUERIES, IMPLEMENTATIONS, Call, on
from exl_cli.engines.exllamav2.attention.smoke_test import Heads, failure
from exl_cli.errors import EngineError

VARIABLE = "EXL_ATTENTION"

_bound: ContextVar[int] = ContextVar("_bound", default=0)
_USUAL = Heads()
# How torch and cuBLAS say that there is no memory.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED")
# Held while candidates are tried, so that whoever needs the choice waits for it.
_trying = threading.Lock()


@dataclass(frozen=True)
class Backend:
    """What computes paged attention on a device.

    Attributes:
        decode: implementations for few queries a sequence, best first.
        prefill: implementations for prompts, best first.
        why_not: the better ones that cannot be had, each with the reason.
    """

    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    why_not: dict[str, str]

    @property
    def captures(self) -> bool:
        """Whether decoding can be captured in a CUDA graph."""
        return self.decode[0] != "torch"

    def __str__(self) -> str:
        """In words: `triton`, or `triton, prompts torch-varlen`."""
        decode, prefill = self.decode[0], self.prefill[0]
        return decode if decode == prefill else f"{decode}, prompts {prefill}"


class _Choice(NamedTuple):
    """What was chosen, and whether it was tried for decoding, too."""

    backend: Backend
    decodes: bool


# By device, what EXL_ATTENTION says, and the size of the heads it was tried on: what can do some may fail with others.
_chosen: dict[tuple[torch.device, str, int], _Choice] = {}


def backend(device: torch.device | None = None, heads: Heads = _USUAL, *, decodes: bool = True) -> Backend:
    """What will be used on a device, by default the current GPU or, without one, the CPU.

    The first call for a device and a size of heads tries the candidates on them: milliseconds, or some seconds where
    Triton has to compile.

    Args:
        device: where.
        heads: of the model that is going to be computed.
        decodes: whether decoding is to be tried as well as prompts; it need not where something else does it.

    Raises:
        EngineError: EXL_ATTENTION names something unknown, or something that cannot be had.
    """
    with _trying:
        return _choose(device or _current(), os.environ.get(VARIABLE, ""), heads, decodes=decodes)


def try_ahead(heads: Heads = _USUAL, *, decodes: bool = True) -> None:
    """Begin to try the candidates on the current GPU, in a thread of its own; `backend` waits for the end of that.

    What EXL_ATTENTION names is tried at once, so that a wrong name is said before anything is waited for.

    Args:
        heads, decodes: as for `backend`.

    Raises:
        EngineError: see `backend`.
    """
    device = _current()
    if os.environ.get(VARIABLE):
        backend(device, heads, decodes=decodes)
    else:
        threading.Thread(target=_try, args=(device, heads, decodes), name="attention trial", daemon=True).start()


def _try(device: torch.device, heads: Heads, decodes: bool) -> None:
    with _trying, contextlib.suppress(Exception):  # what goes wrong does so again for whoever needs the choice
        chosen = _choose(device, "", heads, decodes=decodes)
        # A model that is being loaded holds more memory than it does afterwards: no reason to do without Triton.
        if any(said in reason for reason in chosen.why_not.values() for said in _NO_MEMORY):
            _chosen.clear()


def _current() -> torch.device:
    """The current GPU or, without one, the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _choose(device: torch.device, wanted: str, heads: Heads, *, decodes: bool) -> Backend:
    """What was chosen before, or now."""
    key = (device, wanted, heads.dim)
    if key not in _chosen or (decodes and not _chosen[key].decodes):
        _chosen[key] = _Choice(_chosen_now(device, wanted, heads, decodes=decodes), decodes)
    return _chosen[key].backend


def _chosen_now(device: torch.device, wanted: str, heads: Heads, *, decodes: bool) -> Backend:
    def missing(name: str) -> str:
        reason = IMPLEMENTATIONS[name].missing(device)
        return reason if reason or name == "torch" else failure(name, device, heads, decodes=decodes)

    if wanted:
        if wanted not in IMPLEMENTATIONS:
            raise EngineError(f"{VARIABLE}={wanted} is not known", f"choose one of {', '.join(IMPLEMENTATIONS)}")
        if reason := missing(wanted):
            raise EngineError(f"{VARIABLE}={wanted} cannot be had: {reason}", f"unset {VARIABLE}")
        return Backend((wanted,), (wanted,), {})
    usable: list[str] = []
    why_not: dict[str, str] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        found = any(other != "torch-varlen" for other in usable)
        # What comes after the one in use is for the calls that that one cannot do: not worth a trial in advance.
        if reason := implementation.missing(device) if found else missing(name):
            if not found:
                why_not[name] = reason
        else:
            usable.append(name)
    decode = tuple(name for name in usable if name != "torch-varlen")
    return Backend(decode, tuple(usable), why_not)


def attend_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    max_len: int,
) -> torch.Tensor:
    """Causal attention of the last `q_len` positions of each sequence to all of its positions.

    Nothing is read back from the device, unless `torch` is all there is: then calls cannot be captured.

    Args:
        q: queries, float16, shape (batch, q_len, heads, head_dim).
        k_cache, v_cache: shape (pages, page_size, kv_heads, head_dim); page_size a multiple of 256, heads one of
            kv_heads. What lies in pages that no sequence owns, or behind a sequence's end, does not matter.
        cache_seqlens: int32, shape (batch,): positions of each sequence in the cache; without `k` and `v` the
            queries' own positions are among them.
        block_table: int32, shape (batch, pages of the longest sequence or more): position p of a sequence lies in
            page `block_table[sequence, p // page_size]`.
        k, v: the queries' own keys and values, shape (batch, q_len, kv_heads, head_dim), to be written to the cache
            behind what is there, and then seen.
        scale: factor on the dot products.
        window: each query sees at most this many keys, itself included; 0 for all. So transformers defines it
            (`sliding_window_causal_mask_function`), and models are trained. exllamav2 hands (window, window) to
            flash-attn, which sees one key more.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        max_len: no sequence has more keys than this, new ones included. Known to the host, to size the launch.

    Returns:
        Shape (batch, q_len, heads, head_dim), contiguous, the dtype of q. A query that sees no key gets zeros.

    Raises:
        EngineError: EXL_ATTENTION names an implementation that cannot be had, or cannot do this.
    """
    if q.stride(-1) != 1:
        q = q.contiguous()
    call = Call(q, k_cache, v_cache, cache_seqlens, block_table, k, v, scale, window, softcap, max_len)
    # Heads that no model was loaded for are computed by what can do the usual ones.
    choice = _chosen.get((q.device, os.environ.get(VARIABLE, ""), q.shape[-1]))
    chosen = choice.backend if choice else backend(q.device)
    names = chosen.decode if q.shape[1] <= DECODE_QUERIES else chosen.prefill
    unable = ""
    for name in names:
        unable = IMPLEMENTATIONS[name].unable(call)
        if not unable:
            with on(q.device):
                return IMPLEMENTATIONS[name].attend(call)
    raise EngineError(f"{VARIABLE}={names[0]} cannot run this model: {unable}", f"unset {VARIABLE}")


@contextlib.contextmanager
def at_most(keys: int) -> Iterator[None]:
    """While this lasts, no sequence that exllamav2 attends to has more keys: a tighter bound than its tables' width."""
    token = _bound.set(keys)
    try:
        yield
    finally:
        _bound.reset(token)


def install_paged(heads: Heads = _USUAL, *, decodes: bool = True) -> Backend:
    """Let exllamav2 attend to pages through `attend_paged`. Returns what that uses.

    Its attention without pages stays as it is: `attention.install` mends that.

    Args:
        heads, decodes: as for `backend`.

    Raises:
        EngineError: see `backend`.
    """
    from exllamav2 import attn

    chosen = backend(heads=heads, decodes=decodes)
    attn.flash_attn_with_kvcache = _with_kvcache
    if not (attn.has_flash_attn_with_window and attn.has_flash_attn_with_softcap):
        # They are asked about pages from here on. A flash-attn without them must not be used elsewhere, then.
        attn.has_flash_attn = False
    attn.has_flash_attn_with_paged = True
    attn.has_flash_attn_with_window = True
    attn.has_flash_attn_with_softcap = True
    return chosen


def _with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int] = (0, 0),
    softcap: float = 0.0,
) -> torch.Tensor:
    """`flash_attn.flash_attn_with_kvcache`, as exllamav2 calls it: causal, its window (window, window)."""
    if not causal:
        raise EngineError("paged attention is causal")
    return attend_paged(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        k=k,
        v=v,
        scale=softmax_scale,
        window=window_size[0],
        softcap=softcap,
        max_len=_bound.get() or block_table.shape[1] * k_cache.shape[1],
    )
