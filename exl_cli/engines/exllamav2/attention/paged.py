"""Attention over a KV cache in pages.

exllamav2 0.3.2 pages its cache only with flash-attn. `install_paged` puts `attend_paged` in the place of flash-attn's
function. It runs either of

- `triton`, our kernels (`triton_kernels`), on GPUs from compute capability 8.0 on where a small case comes out right;
- `torch`: pages gathered, `causal_attention` on one sequence after the other. It reads lengths back from the device,
  so that no CUDA graph can capture it.

EXL_ATTENTION names the one to use instead. Where it is not set, models that run through kernels of our own attend from
few tokens by one of these, too (`kernels/decode_attention.py`): in one launch with the rotary embedding it is faster.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.attention.causal import causal_attention
from exl_cli.engines.exllamav2.cuda_errors import cause
from exl_cli.engines.exllamav2.support import too_old
from exl_cli.errors import EngineError

VARIABLE = "EXL_ATTENTION"
NAMES = ("triton", "torch")

# The smoke test's prompt: this many queries, after enough cached tokens that large GPUs split the keys, in such pages.
_TRIED, _BEFORE, _PAGE = 40, 1000, 256
_TOLERANCE = 0.01

_bound: ContextVar[int] = ContextVar("_bound", default=0)


class Heads(NamedTuple):
    """A model's heads: of queries, of keys and values, and the size of each."""

    queries: int = 8
    keys: int = 2
    dim: int = 128


class Call(NamedTuple):
    """The arguments of `attend_paged`, described there."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    scale: float
    window: int
    softcap: float
    max_len: int
    out: torch.Tensor | None = None


@dataclass(frozen=True)
class Backend:
    """What computes paged attention on a device.

    Attributes:
        name: one of `NAMES`.
        why_not: why Triton is not used, if torch was not chosen explicitly.
    """

    name: str
    why_not: str = ""

    @property
    def captures(self) -> bool:
        """Whether decoding can be captured in a CUDA graph."""
        return self.name != "torch"

    def __str__(self) -> str:
        return self.name


_USUAL = Heads()
# By device, value of EXL_ATTENTION and head size, as a backend may work with some head sizes and fail with others.
_chosen: dict[tuple[torch.device, str, int], Backend] = {}
_trying = threading.Lock()


def unusual(head_dim: int) -> bool:
    """Whether only plain torch can do heads of this size."""
    return head_dim > 256 or head_dim % 8 > 0


def backend(device: torch.device | None = None, heads: Heads = _USUAL) -> Backend:
    """The backend for a device, by default the current GPU or, without one, the CPU.

    The first call for a device and a size of heads runs the smoke test: milliseconds, or some seconds where Triton has
    to compile.

    Args:
        device: where.
        heads: of the model that is going to be computed.

    Raises:
        EngineError: EXL_ATTENTION names something unknown, or something that does not work here.
    """
    device, wanted = device or _current(), os.environ.get(VARIABLE, "")
    key = (device, wanted, heads.dim)
    with _trying:
        if key not in _chosen:
            _chosen[key] = _choose(device, wanted, heads)
        return _chosen[key]


def _choose(device: torch.device, wanted: str, heads: Heads) -> Backend:
    if wanted and wanted not in NAMES:
        raise EngineError(f"unknown value {VARIABLE}={wanted}", f"choose one of {', '.join(NAMES)}")
    if wanted == "torch":
        return Backend("torch")
    if not (reason := _why_not_triton(device) or failure(_triton, device, heads)):
        return Backend("triton")
    if wanted:
        raise EngineError(f"{VARIABLE}={wanted} is not available: {reason}", f"unset {VARIABLE}")
    return Backend("torch", reason)


def try_ahead(heads: Heads = _USUAL) -> None:
    """Start the smoke test on the current GPU in a thread; `backend` waits for its end.

    A failure there does not count: a model that is being loaded may hold more memory than it does afterwards.

    Raises:
        EngineError: see `backend`; at once where EXL_ATTENTION is set.
    """
    device = _current()
    if os.environ.get(VARIABLE):
        backend(device, heads)
        return

    def smoke_test() -> None:
        with _trying, contextlib.suppress(Exception):  # recurs where the choice is needed
            if (chosen := _choose(device, "", heads)).name == "triton":
                _chosen.setdefault((device, "", heads.dim), chosen)

    threading.Thread(target=smoke_test, name="attention smoke test", daemon=True).start()


def _current() -> torch.device:
    """The current GPU or, without one, the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last `q_len` positions of each sequence to all of its positions.

    Args:
        q: queries, float16, shape (batch, q_len, heads, head_dim).
        k_cache, v_cache: shape (pages, page_size, kv_heads, head_dim), contiguous; page_size a multiple of 256. What
            lies in pages that no sequence owns, or behind a sequence's end, does not matter.
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
        out: where the result goes; None to allocate it.

    Returns:
        Shape (batch, q_len, heads, head_dim), contiguous, the dtype of q. A query that sees no key gets zeros.

    Raises:
        EngineError: EXL_ATTENTION names what does not work here, or cannot do this.
    """
    if q.stride(-1) != 1:
        q = q.contiguous()
    call = Call(q, k_cache, v_cache, cache_seqlens, block_table, k, v, scale, window, softcap, max_len, out)
    wanted, head_dim = os.environ.get(VARIABLE, ""), q.shape[-1]
    # For head sizes of no loaded model, use the backend tested with the default ones.
    chosen = _chosen.get((q.device, wanted, head_dim)) or backend(q.device)
    if chosen.name == "torch":
        return attend_in_torch(call)
    if unusual(head_dim):
        if wanted:
            raise EngineError(
                f"{VARIABLE}={wanted} cannot run this model: heads of {head_dim} values", f"unset {VARIABLE}"
            )
        return attend_in_torch(call)
    return _triton(call)


def _why_not_triton(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    # Triton's own interpreter runs kernels on the CPU, in the tests.
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else too_old(device)


def _triton(call: Call) -> torch.Tensor:
    from exl_cli.engines.exllamav2.attention import launch

    device = call.q.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return launch.attend(call)
    with torch.cuda.device(device):  # kernels start on the current device, wherever their tensors are
        return launch.attend(call)


def attend_in_torch(call: Call) -> torch.Tensor:
    """Compute a call of `attend_paged` in plain torch."""
    q, page_size = call.q, call.k_cache.shape[1]
    q_len, lengths = q.shape[1], call.cache_seqlens
    if call.k is not None and call.v is not None:
        positions = lengths.long()[:, None] + torch.arange(q_len, device=q.device)
        pages = call.block_table.long().gather(1, positions // page_size)
        call.k_cache[pages, positions % page_size] = call.k
        call.v_cache[pages, positions % page_size] = call.v
        lengths = lengths + q_len
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if call.out is None else call.out.zero_()
    for row, length in enumerate(lengths.tolist()):
        new = min(q_len, length)
        if not new:
            continue
        before = max(length - new - call.window + 1, 0) // page_size if call.window else 0
        pages = call.block_table[row, before : -(-length // page_size)]
        keys, values = (
            cache[pages].flatten(0, 1)[None, : length - before * page_size] for cache in (call.k_cache, call.v_cache)
        )
        out[row : row + 1, q_len - new :] = causal_attention(
            q[row : row + 1, q_len - new :], keys, values, call.scale, window=call.window, softcap=call.softcap
        )
    return out


def failure(attend: Callable[[Call], torch.Tensor], device: torch.device, heads: Heads) -> str:
    """Smoke test: compute small cases on a device. Returns what goes wrong; empty if nothing does.

    Args:
        attend: computes a call.
        device: where.
        heads: of the model that will be computed, so that what is compiled here serves again.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    pages = -(-(_BEFORE + _TRIED) // _PAGE)
    keys, values = (normal(pages, _PAGE, heads.keys, heads.dim) for _ in range(2))
    expected_keys, expected_values = keys.clone(), values.clone()
    new_keys, new_values = (normal(1, _TRIED, heads.keys, heads.dim) for _ in range(2))
    table = torch.arange(pages, dtype=torch.int32, device=device).flip(0)[None]
    try:
        for q_len in (_TRIED, 1):
            # The token is the prompt's last one: its key and value are in the cache.
            k, v, seen = (new_keys, new_values, _BEFORE) if q_len > 1 else (None, None, _BEFORE + _TRIED)
            lengths = torch.tensor([seen], dtype=torch.int32, device=device)
            q, scale = normal(1, q_len, heads.queries, heads.dim), heads.dim**-0.5
            call = Call(q, keys, values, lengths, table, k, v, scale, 0, 0.0, _BEFORE + _TRIED)
            actual = attend(call).float()
            # A softcap too high to matter: without one, torch's compiler would be imported for the mask.
            reference = call._replace(k_cache=expected_keys, v_cache=expected_values, softcap=1e4)
            expected = attend_in_torch(reference).float()
            if not float((actual - expected).norm() / expected.norm()) < _TOLERANCE:
                return "computes wrong results"
        if not (torch.equal(keys, expected_keys) and torch.equal(values, expected_values)):
            return "stores keys and values in wrong places"
    except Exception as problem:  # compilers and drivers raise what they like
        return f"fails: {cause(problem)}"
    return ""


@contextlib.contextmanager
def at_most(keys: int) -> Iterator[None]:
    """While this lasts, no sequence that exllamav2 attends to has more keys: a tighter bound than its tables' width."""
    token = _bound.set(keys)
    try:
        yield
    finally:
        _bound.reset(token)


def install_paged(heads: Heads = _USUAL) -> Backend:
    """Let exllamav2 attend to pages through `attend_paged`. Returns what that uses.

    Raises:
        EngineError: see `backend`.
    """
    from exllamav2 import attn

    chosen = backend(heads=heads)
    attn.flash_attn_with_kvcache = _with_kvcache
    attn.has_flash_attn_with_paged = attn.has_flash_attn_with_window = attn.has_flash_attn_with_softcap = True
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
        q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=block_table, k=k, v=v, scale=softmax_scale,
        window=window_size[0], softcap=softcap, max_len=_bound.get() or block_table.shape[1] * k_cache.shape[1],
    )  # fmt: skip
