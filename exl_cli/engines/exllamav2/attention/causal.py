"""Causal attention for exllamav2 where flash-attn is not in use.

Stands for two upstream defects (exllamav2 0.3.2, `attn.py`, `_attn_torch`):

- its SDPA branch asks for the block-diagonal mask, which is None for an ordinary model, so that every prompt position
  attends to the whole prompt: relative error of the logits 0.3 to 0.46 instead of 0.001;
- its matmul branch cuts a sliding window at the last query's position for all queries of a prompt, so that earlier
  ones see too few keys, and takes the softmax in float16.

`install` puts `causal_attention` in the place of that method. It is pure torch, and is compared with float32 attention
in the tests; through the engine it is guarded by the golden file.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Attention of the last `q_len` positions of a sequence to all of its `k_len` positions.

    Args:
        q: queries, shape (batch, q_len, heads, head_dim).
        k, v: keys and values, shape (batch, k_len, kv_heads, head_dim); k_len >= q_len, heads a multiple of kv_heads.
        scale: factor on the dot products.
        window: each query sees at most this many keys, itself included; 0 for all.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        bias: added to the scores, broadcastable to (batch, heads, q_len, k_len); for padded batches.
        causal: a query sees keys up to its own position only.

    Returns:
        Shape (batch, q_len, heads, head_dim), the dtype of q.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q_len, k_len = q.shape[2], k.shape[2]
    if window and q_len == 1 and k_len > window and bias is None:
        k, v = k[:, :, -window:], v[:, :, -window:]
        k_len = window
    groups = q.shape[1] // k.shape[1]
    windowed = bool(window) and k_len > window
    offset = causal and 1 < q_len < k_len
    masked = bias is not None or windowed or offset
    if bias is None and not windowed and not softcap and _has_grouped_kernel(q.device):
        # is_causal aligns its mask to the upper left corner. This bias means the lower right one to flash attention,
        # and takes no memory there.
        corner = _lower_right(q_len, k_len) if offset else None
        is_causal = causal and q_len > 1 and not offset
        out = F.scaled_dot_product_attention(q, k, v, corner, is_causal=is_causal, scale=scale, enable_gqa=groups > 1)
        return out.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap:
        out = _by_matmul(q, k, v, scale, softcap, _mask(q_len, k_len, window, bias, causal, q.device))
    elif masked:
        mask = _mask(q_len, k_len, window, bias, causal, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and q_len > 1, scale=scale)
    return out.transpose(1, 2)


def _lower_right(q_len: int, k_len: int) -> torch.Tensor:
    # Imported for the few calls that need it: torch's compiler comes with it, seconds where files open slowly.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(q_len, k_len)


@lru_cache
def _has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch has a kernel that shares keys among query heads without copying them: its flash attention."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _mask(
    q_len: int, k_len: int, window: int, bias: torch.Tensor | None, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Which keys each query sees: boolean, or additive where a bias is given; None for all."""
    query = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)[None, :]
    seen: torch.Tensor | None = None
    if causal and q_len > 1:
        seen = key <= query
    if window and k_len > window:
        near = key > query - window
        seen = near if seen is None else seen & near
    if bias is None:
        return seen
    return bias if seen is None else bias.masked_fill(~seen, torch.finfo(bias.dtype).min)


def _by_matmul(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float, mask: torch.Tensor | None
) -> torch.Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def install() -> None:
    """Give exllamav2 this attention instead of its own. Does nothing the second time."""
    from exllamav2.attn import ExLlamaV2Attention

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
    ) -> torch.Tensor:
        bias = None if attn_params.is_causal() else attn_params.get_attn_mask(q_states.device)
        if self.layer_idx in attn_params.block_diag_layers:
            bias, causal = attn_params.get_block_diag_mask(q_states.device), False
        out = causal_attention(
            q_states,
            k_states,
            v_states,
            self.scaling,
            window=self.sliding_window or 0,
            softcap=cfg.attn_logit_softcapping or 0.0,
            bias=bias,
            causal=causal,
        )
        return out.reshape(batch_size, q_len, -1)

    ExLlamaV2Attention._attn_torch = attend
    # cuDNN's kernels plan anew for every key length, about 70 ms for each new token of a process's first answer.
    torch.backends.cuda.enable_cudnn_sdp(False)
