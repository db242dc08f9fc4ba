"""Whether an implementation of attention works on a device: it computes small cases, as a model will ask for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.attention.backends import IMPLEMENTATIONS, Call, on
from exl_cli.engines.exllamav2.cuda_errors import cause


class Heads(NamedTuple):
    """A model's heads: of queries, of keys and values, and values of each."""

    queries: int = 8
    keys: int = 2
    dim: int = 128


# Tokens of a prompt's end that a trial computes, behind so many that large GPUs divide their keys among programs.
_TRIED, _BEFORE, _PAGE = 40, 1000, 256
# Of results, relative to what they should be.
_TOLERANCE = 0.01


def failure(name: str, device: torch.device, heads: Heads, *, decodes: bool) -> str:
    """What goes wrong when an implementation computes small cases on a device; empty where all is right.

    Args:
        name: of the implementation.
        device: where.
        heads: as the model has them that will be computed: what is compiled for a case then serves again.
        decodes: whether to try a case of one token as well as one of a prompt.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    def number(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    total = _BEFORE + _TRIED
    pages, scale = -(-total // _PAGE), heads.dim**-0.5
    keys, values = normal(pages, _PAGE, heads.keys, heads.dim), normal(pages, _PAGE, heads.keys, heads.dim)
    new_keys, new_values = normal(1, _TRIED, heads.keys, heads.dim), normal(1, _TRIED, heads.keys, heads.dim)
    table = torch.arange(pages, dtype=torch.int32, device=device).flip(0)[None]
    prompt, token = normal(1, _TRIED, heads.queries, heads.dim), normal(1, 1, heads.queries, heads.dim)
    cases = [Call(prompt, keys, values, number(_BEFORE), table, new_keys, new_values, scale, 0, 0.0, total)]
    if decodes:
        cases.append(Call(token, keys, values, number(total), table, None, None, scale, 0, 0.0, total))
    try:
        for call in cases:
            with on(device):
                actual, expected = IMPLEMENTATIONS[name].attend(call), _expected(call)
            error = float((actual.float() - expected.float()).norm() / expected.float().norm())
            if not error < _TOLERANCE:
                return "computes wrong results"
        stored = torch.stack([_in_order(cache, table)[_BEFORE:total] for cache in (keys, values)])
        if not torch.equal(stored, torch.cat([new_keys, new_values])):
            return "stores keys and values in wrong places"
    except Exception as problem:  # compilers and drivers raise what they like
        return f"fails: {cause(problem)}"
    return ""


def _in_order(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The keys or values of the sequence, by position: shape (positions, heads, head_dim)."""
    return cache[table[0].long()].flatten(0, 1)


def _expected(call: Call) -> torch.Tensor:
    """What a trial's case should give: in float32, with nothing spared.

    Not by `causal_attention`: what that prefers for such a case brings torch's compiler, five seconds of import.
    """
    q_len, heads = call.q.shape[1:3]

    def seen(cache: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
        known = _in_order(cache, call.block_table)[: call.max_len].float()
        if new is not None:
            known[-q_len:] = new[0].float()
        return known.repeat_interleave(heads // cache.shape[2], 1).transpose(0, 1)

    keys, values = seen(call.k_cache, call.k), seen(call.v_cache, call.v)
    scores = call.q[0].transpose(0, 1).float() @ keys.transpose(1, 2) * call.scale
    key = torch.arange(call.max_len, device=call.q.device)
    scores = scores.masked_fill(key[None, :] > key[-q_len:, None], float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)[None]
