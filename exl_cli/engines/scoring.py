"""How likely a model finds a text: log-likelihoods of tokens from an engine's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exl_cli.engines.base import CachedScoring, Engine

# Rows whose log-softmax is taken at a time, so that no second copy of a window's logits is needed.
_ROWS = 64


def log_likelihoods(engine: Engine, ids: Sequence[int], count: int, step: int) -> list[float]:
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
    logits = engine.cached_logits(ids, step) if isinstance(engine, CachedScoring) else engine.logits(ids)
    found: list[float] = []
    for begin in range(len(ids) - 1 - count, len(ids) - 1, _ROWS):
        end = min(begin + _ROWS, len(ids) - 1)
        wanted = torch.tensor(list(ids[begin + 1 : end + 1]))[:, None]
        found += torch.log_softmax(logits[begin:end].float(), -1).gather(1, wanted)[:, 0].tolist()
    return found
