"""Log-probabilities under the raw model distribution."""

from __future__ import annotations

import math

import numpy as np

from exl_cli.engines.base import TokenLogprobs
from exl_cli.engines.sampling.dry import FloatArray
from exl_cli.engines.sampling.filters import best, shortlist


def token_logprobs(logits: FloatArray, token_id: int, count: int, vocab_size: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the most likely tokens, in nats.

    Args:
        logits: float32, [n]; normalized over all of them.
        token_id: the token.
        count: number of most likely tokens.
        vocab_size: size of the tokenizer's vocabulary; padding beyond it is never among the most likely.
    """
    highest = np.maximum.reduce(logits)
    total = float(highest) + math.log(np.add.reduce(np.exp(logits - highest), dtype=np.float64))
    named = logits[:vocab_size]
    count = min(count, len(named))
    ids, _ = shortlist(named, count) if 0 < count < len(named) else (np.arange(len(named)), highest)
    ids = ids[best(named[ids], count)] if count else ids[:0]
    top = tuple(zip(ids.tolist(), (named[ids].astype(np.float64) - total).tolist(), strict=True))
    return TokenLogprobs(token_id, float(logits[token_id]) - total, top)
