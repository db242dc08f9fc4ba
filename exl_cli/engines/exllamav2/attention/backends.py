"""The implementations behind `paged_attention.attend_paged`: what each needs of the machine, and its call.

Every `Implementation.attend` takes what `attend_paged` takes, in the form of a `Call`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from exl_cli.engines.exllamav2.attention.causal import causal_attention
from exl_cli.engines.exllamav2.cuda_errors import cause
from exl_cli.engines.exllamav2.support import too_old

# Up to here a call is decoding, or the check of a few guessed tokens: bound by reading the cache.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class Call:
    """The arguments of `paged_attention.attend_paged`, described there."""

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


@dataclass(frozen=True)
class Implementation:
    """One way to compute paged attention.

    Attributes:
        attend: computes a call.
        missing: why a device cannot have it, as far as that is known without trying; empty where nothing is.
        unable: why it cannot do a call, empty where it can.
    """

    attend: Callable[[Call], torch.Tensor]
    missing: Callable[[torch.device], str]
    unable: Callable[[Call], str]


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device, wherever their tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def unusual(head_dim: int) -> bool:
    """Whether heads have a size that only plain torch can do."""
    return head_dim > 256 or head_dim % 8 > 0


def _unusual_heads(call: Call) -> str:
    dim = call.q.shape[-1]
    return f"heads of {dim} values" if unusual(dim) else ""


# flash-attn, the package


@lru_cache
def _flash_attn() -> Any:
    """Its function. Raises whatever a broken install raises, or ImportError with a reason."""
    module: Any = importlib.import_module("flash_attn")
    version = tuple(int(part) for part in str(module.__version__).split(".")[:3] if part.isdigit())
    if version < (2, 5, 7):
        raise ImportError(f"version {module.__version__} has no paged attention, 2.5.7 has")
    return module.flash_attn_with_kvcache


def _flash_missing(device: torch.device) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed"
    try:
        _flash_attn()
    except Exception as error:  # a compiled extension: anything can come out
        return f"cannot be imported: {cause(error)}"
    return too_old(device)


def _flash_unable(call: Call) -> str:
    accepted = inspect.signature(_flash_attn()).parameters
    if call.softcap and "softcap" not in accepted:
        return "this version cannot cap scores"
    if call.window and "window_size" not in accepted:
        return "this version has no sliding window"
    return _unusual_heads(call)


def _flash(call: Call) -> torch.Tensor:
    # Its left window does not count the query's own key, a model's window does.
    options: dict[str, Any] = {"window_size": (call.window - 1, 0)} if call.window else {}
    if call.softcap:
        options["softcap"] = call.softcap
    out: torch.Tensor = _flash_attn()(
        call.q,
        call.k_cache,
        call.v_cache,
        call.k,
        call.v,
        cache_seqlens=call.cache_seqlens,
        block_table=call.block_table,
        softmax_scale=call.scale,
        causal=True,
        **options,
    )
    return out


# torch's flash attention over pages


@lru_cache
def _flash_of_torch() -> Any:
    """The operator behind `torch.nn.attention.varlen.varlen_attn`, or None where this torch's takes no pages.

    That module is not imported: torch's compiler comes with it, seconds where files open slowly.
    """
    try:
        operator = torch.ops.aten._flash_attention_forward.default
        accepted = {argument.name for argument in operator._schema.arguments}
    except (AttributeError, RuntimeError):
        return None
    wanted = {"scale", "window_size_left", "window_size_right", "seqused_k", "block_table"}
    return operator if wanted <= accepted else None


def _varlen_missing(device: torch.device) -> str:
    if _flash_of_torch() is None:
        return f"torch {torch.__version__.split('+')[0]} has none for pages, 2.13 has"
    return too_old(device)


def _varlen_unable(call: Call) -> str:
    return "it cannot cap scores" if call.softcap else _unusual_heads(call)


def _varlen(call: Call) -> torch.Tensor:
    batch, q_len, heads, head_dim = call.q.shape
    ends = torch.arange(0, (batch + 1) * q_len, q_len, dtype=torch.int32, device=call.q.device)
    out: torch.Tensor = _flash_of_torch()(
        call.q.reshape(batch * q_len, heads, head_dim),
        call.k_cache,
        call.v_cache,
        ends,
        None,
        q_len,
        call.max_len,
        0.0,
        call.window == 0,  # causal; a window that ends at the query is so by itself
        False,
        scale=call.scale,
        # A left window does not count the query's own key; -1 is none.
        window_size_left=call.window - 1,
        window_size_right=0,
        seqused_k=_append(call),
        block_table=call.block_table,
    )[0]
    return out.view(call.q.shape)


# our Triton kernels


def _triton_missing(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    # Triton's own interpreter runs kernels on the CPU; that is what the tests do.
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else too_old(device)


def _triton_unable(call: Call) -> str:
    return _unusual_heads(call)


def _triton(call: Call) -> torch.Tensor:
    from exl_cli.engines.exllamav2.attention import launch

    return launch.attend(call)


# plain torch


def _torch(call: Call) -> torch.Tensor:
    q, page_size = call.q, call.k_cache.shape[1]
    q_len = q.shape[1]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for row, length in enumerate(_append(call).tolist()):
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


def _append(call: Call) -> torch.Tensor:
    """Put a call's new keys and values into the pages. Returns the lengths that the sequences then have."""
    if call.k is None or call.v is None:
        return call.cache_seqlens
    page_size = call.k_cache.shape[1]
    positions = call.cache_seqlens.long()[:, None] + torch.arange(call.k.shape[1], device=call.q.device)
    pages = call.block_table.long().gather(1, positions // page_size)
    call.k_cache[pages, positions % page_size] = call.k
    call.v_cache[pages, positions % page_size] = call.v
    return call.cache_seqlens + call.k.shape[1]


IMPLEMENTATIONS = {
    "flash-attn": Implementation(_flash, _flash_missing, _flash_unable),
    "torch-varlen": Implementation(_varlen, _varlen_missing, _varlen_unable),
    "triton": Implementation(_triton, _triton_missing, _triton_unable),
    "torch": Implementation(_torch, lambda device: "", lambda call: ""),
}
