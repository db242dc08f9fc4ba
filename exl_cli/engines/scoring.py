"""Whether an engine computes what its model means: log-likelihoods of a text, and how another engine's choices fare."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from exl_cli.engines.base import CachedScoring

# Rows whose log-softmax is taken at a time, so that no second copy of a window's logits is needed.
_ROWS = 64
# Tokens a pass.
_STEP = 2048


def log_likelihoods(engine: CachedScoring, ids: Sequence[int], count: int, step: int) -> list[float]:
    """Natural logarithms of the probabilities that a model gives to the last tokens of a text.

    Args:
        engine: a loaded model.
        ids: the text's token ids.
        count: how many of its last tokens, at most len(ids) - 1.
        step: tokens a pass where the engine's cache may be quantized, so that keys and values come out of it as they
            do while generating; elsewhere all are evaluated at once.

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
    """How many tokens the model hesitates between at each token of a text, on average; NaN where it computes none.

    Args:
        engine: a loaded model.
        ids: the text's token ids, at least two.
    """
    values = log_likelihoods(engine, ids, len(ids) - 1, _STEP)
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        return math.nan
    return math.exp(min(-mean, 700.0))


def shortfalls(engine: CachedScoring, ids: Sequence[int], count: int) -> list[float]:
    """How far below the engine's own first choice each of the last tokens is: 0 for its choice, else a difference of
    logits.

    Args:
        engine: a loaded model.
        ids: prompt and response.
        count: the response's tokens, at the end of `ids`.
    """
    logits = engine.cached_logits(ids, len(ids))[len(ids) - 1 - count : len(ids) - 1].float()
    chosen = torch.tensor(list(ids[len(ids) - count :]))[:, None]
    differences: list[float] = (logits.max(-1).values - logits.gather(1, chosen)[:, 0]).tolist()
    return differences


def distance(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """How far logits are from those of a reference.

    Args:
        logits, reference: of the same positions; where one has more columns than the other, these are padding.

    Returns:
        The L2 norm of their difference, relative to the reference's, and the Kullback-Leibler divergence of the
        distributions from the reference's, in nats, on average over the positions.
    """
    width = min(logits.shape[-1], reference.shape[-1])
    logits, reference = logits[:, :width].float(), reference[:, :width].float()
    ours, theirs = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return float((logits - reference).norm() / reference.norm()), float(divergence)
