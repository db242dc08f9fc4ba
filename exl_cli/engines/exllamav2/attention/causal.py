"""Causal attention in plain torch, in place of exllamav2's own.

exllamav2 0.3.2 (`attn.py`, `_attn_torch`) computes prompts wrongly where flash-attn is not in use:

- its SDPA branch asks for the block-diagonal mask, which is None for an ordinary model: every position attends to the
  whole prompt, and the relative error of the logits is 0.3 to 0.46 instead of 0.001;
- its matmul branch cuts a sliding window at the last query's position for all queries of a prompt, so earlier ones see
  too few keys, and takes the softmax in float16.

`causal_attention` is compared with attention in float64 in the tests; through the engine the golden file guards it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, window: int = 0, softcap: float = 0.0
) -> torch.Tensor:
    """Attention of the last `q_len` positions of a sequence to all of its `k_len` positions.

    Args:
        q: queries, shape (batch, q_len, heads, head_dim).
        k, v: keys and values, shape (batch, k_len, kv_heads, head_dim); k_len >= q_len, heads a multiple of kv_heads.
        scale: factor on the dot products.
        window: each query sees at most this many keys, itself included; 0 for all.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.

    Returns:
        Shape (batch, q_len, heads, head_dim), the dtype of q.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window and q.shape[2] == 1:
        k, v = k[:, :, -window:], v[:, :, -window:]
    q_len, k_len, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    windowed, offset = 0 < window < k_len, 1 < q_len < k_len
    flash = not windowed and not softcap and _has_grouped_kernel(q.device)
    if groups > 1 and not flash:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap:
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~_seen(q, k, window), float("-inf"))
        out = torch.matmul(scores.softmax(-1).to(v.dtype), v)
    else:
        mask: torch.Tensor | None = None
        if windowed or offset:
            # is_causal aligns its mask to the upper left corner. A bias for the lower right one takes no memory where
            # flash attention computes it.
            mask = _lower_right(q_len, k_len) if flash and q.is_cuda else _seen(q, k, window)
        causal, grouped = mask is None and q_len > 1, flash and groups > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    # The softmax weights are rounded, so a weighted average may exceed every value, and thus the dtype's range.
    limits = torch.finfo(out.dtype)
    return out.clamp_(limits.min, limits.max).transpose(1, 2)


def _seen(q: torch.Tensor, k: torch.Tensor, window: int) -> torch.Tensor:
    """Which keys each query sees, shape (q_len, k_len)."""
    key = torch.arange(k.shape[2], device=q.device)
    query = key[k.shape[2] - q.shape[2] :, None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def _lower_right(q_len: int, k_len: int) -> torch.Tensor:
    # Imported for the few calls that need it: torch's compiler comes with it, seconds where files open slowly.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(q_len, k_len)


@cache
def _has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch has a kernel that shares keys among query heads without copying them: its flash attention."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def install() -> None:
    """Give exllamav2 this attention in place of its two."""
    from exllamav2 import attn

    original = attn.ExLlamaV2Attention._attn_torch

    def attend(
        self: Any,
        batch_size: int,
        q_len: int,
        q_states: torch.Tensor,
        k_states: torch.Tensor,
        v_states: torch.Tensor,
        attn_params: Any,
        cfg: Any,
        causal: bool = True,
    ) -> Any:
        if not causal or not attn_params.is_causal() or self.layer_idx in attn_params.block_diag_layers:
            # Padded batches and images, which exl does not compute.
            return original(self, batch_size, q_len, q_states, k_states, v_states, attn_params, cfg, causal)
        window, softcap = self.sliding_window or 0, cfg.attn_logit_softcapping or 0.0
        out = causal_attention(q_states, k_states, v_states, self.scaling, window=window, softcap=softcap)
        return out.reshape(batch_size, q_len, -1)

    attn.ExLlamaV2Attention._attn_torch = attend
    attn.has_flash_attn = False
    # cuDNN's kernels plan again for every key length, about 70 ms for each new token of a process's first answer.
    torch.backends.cuda.enable_cudnn_sdp(False)
