"""Quality metrics: log-likelihoods, perplexity, logit gaps of another engine's tokens, distance of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from exl_cli.engines.base import CachedScoring

# Rows per log-softmax, to avoid a second copy of all logits.
_ROWS = 64
# Tokens per forward pass.
_STEP = 2048


def log_likelihoods(engine: CachedScoring, ids: Sequence[int], count: int, step: int) -> list[float]:
    """Log-likelihoods, in nats, of the last tokens of a text.

    Args:
        engine: a loaded model.
        ids: the text's token ids.
        count: number of tokens to score, at most len(ids) - 1.
        step: tokens per forward pass. Small steps read keys and values back from a quantized cache, as decoding does.

    Returns:
        `count` numbers, at most 0.
    """
    logits = engine.cached_logits(ids, step)
    values: list[float] = []
    for begin in range(len(ids) - 1 - count, len(ids) - 1, _ROWS):
        end = min(begin + _ROWS, len(ids) - 1)
        wanted = torch.tensor(list(ids[begin + 1 : end + 1]))[:, None]
        values += torch.log_softmax(logits[begin:end].float(), -1).gather(1, wanted)[:, 0].tolist()
    return values


def perplexity(engine: CachedScoring, ids: Sequence[int]) -> float:
    """Perplexity of a text of at least two tokens; NaN if the model computes NaN or infinities."""
    values = log_likelihoods(engine, ids, len(ids) - 1, _STEP)
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        return math.nan
    return math.exp(min(-mean, 700.0))


def shortfalls(engine: CachedScoring, ids: Sequence[int], count: int) -> list[float]:
    """For each of the last tokens, the engine's top logit minus that token's logit; 0 if it is the engine's choice.

    Args:
        engine: a loaded model.
        ids: prompt and response.
        count: tokens of the response.
    """
    logits = engine.cached_logits(ids, len(ids))[len(ids) - 1 - count : len(ids) - 1].float()
    chosen = torch.tensor(list(ids[len(ids) - count :]))[:, None]
    differences: list[float] = (logits.max(-1).values - logits.gather(1, chosen)[:, 0]).tolist()
    return differences


def distance(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Compare logits with those of a reference.

    Args:
        logits, reference: [positions, vocabulary]; extra columns of the wider one are padding.

    Returns:
        Relative L2 error, and KL(reference || logits) in nats, averaged over positions.
    """
    width = min(logits.shape[-1], reference.shape[-1])
    logits, reference = logits[:, :width].float(), reference[:, :width].float()
    ours, theirs = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return float((logits - reference).norm() / reference.norm()), float(divergence)
