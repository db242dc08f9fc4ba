"""Whether an engine computes what its model means: how it finds plain English, and how another finds its choices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from exl_cli.engines.base import Engine
from exl_cli.engines.scoring import log_likelihoods

_STEP = 2048


def perplexity(engine: Engine, ids: Sequence[int]) -> float:
    """How many tokens the model hesitates between at each token of a text, on average; NaN where it computes none.

    Args:
        engine: a loaded model.
        ids: the text's token ids, at least two.
    """
    found = log_likelihoods(engine, ids, len(ids) - 1, _STEP)
    mean = sum(found) / len(found)
    if not math.isfinite(mean):
        return math.nan
    return math.exp(min(-mean, 700.0))


def shortfalls(engine: Engine, ids: Sequence[int], count: int) -> list[float]:
    """How far below the engine's own first choice each of the last tokens is: 0 for its choice, else a difference of
    logits.

    Args:
        engine: a loaded model.
        ids: prompt and response.
        count: the response's tokens, at the end of `ids`.
    """
    logits = engine.logits(ids)[len(ids) - 1 - count : len(ids) - 1].float()
    chosen = torch.tensor(list(ids[len(ids) - count :]))[:, None]
    found: list[float] = (logits.max(-1).values - logits.gather(1, chosen)[:, 0]).tolist()
    return found
