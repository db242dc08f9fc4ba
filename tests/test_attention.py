"""The attention that stands in for exllamav2's: against a float64 definition, written out query by query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl_cli.engines.exllamav2.attention.causal import causal_attention


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int, softcap: float) -> np.ndarray:
    """Softmax attention in float64. Shapes [batch, len, heads, dim]; keys and values may have fewer heads."""
    batch, q_len, heads, _ = q.shape
    k_len, groups = k.shape[1], heads // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, :, h // groups], v[b, :, h // groups]
            for i in range(q_len):
                at = k_len - q_len + i
                scores = keys @ q[b, i, h] * scale
                if softcap:
                    scores = np.tanh(scores / softcap) * softcap
                position = np.arange(k_len)
                hidden = position > at
                if window:
                    hidden |= position <= at - window
                weights = np.exp(np.where(hidden, -np.inf, scores - scores[~hidden].max()))
                out[b, i, h] = weights / weights.sum() @ values
    return out


CASES = [
    # q_len, k_len, heads, kv_heads, dim, window, softcap
    (9, 9, 4, 4, 64, 0, 0.0),
    (9, 9, 4, 2, 64, 0, 0.0),
    (1, 13, 8, 1, 80, 0, 0.0),
    (5, 17, 4, 2, 128, 0, 0.0),
    (12, 12, 2, 2, 64, 4, 0.0),
    (6, 20, 4, 2, 64, 5, 0.0),
    (1, 20, 4, 2, 64, 5, 0.0),
    (8, 8, 4, 2, 256, 64, 0.0),
    (7, 11, 4, 2, 64, 0, 30.0),
    (1, 11, 4, 2, 64, 0, 30.0),
    (7, 20, 4, 2, 96, 6, 30.0),
    (1, 1, 4, 2, 64, 0, 0.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_attention(case: tuple[int, int, int, int, int, int, float], batch: int) -> None:
    q_len, k_len, heads, kv_heads, dim, window, softcap = case
    rng = np.random.default_rng(abs(hash(case)) % 2**32)
    q = rng.normal(size=(batch, q_len, heads, dim)) * 2
    k, v = (rng.normal(size=(batch, k_len, kv_heads, dim)) for _ in range(2))
    actual = causal_attention(
        *(torch.from_numpy(x).float() for x in (q, k, v)), dim**-0.5, window=window, softcap=softcap
    )
    expected = by_definition(q, k, v, dim**-0.5, window, softcap)
    assert actual.shape == q.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-4, atol=2e-5)
