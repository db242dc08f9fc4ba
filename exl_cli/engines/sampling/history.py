"""The tokens that a sampler has behind it, kept so that each new token costs only itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exl_cli.engines.sampling.dry import BoolArray, IntArray


class History:
    """A history as arrays. Between calls it may only grow at its end; a shorter one is read afresh.

    Args:
        vocab_size: ids from there on are not marked as seen.
    """

    def __init__(self, vocab_size: int) -> None:
        self._tokens = np.empty(256, dtype=np.int64)
        self._seen = np.zeros(vocab_size, dtype=np.bool_)
        self._length = self._read = self._marked = 0

    def read(self, history: Sequence[int]) -> IntArray:
        """The whole history, shape [n]: a view that the next call may overwrite."""
        n = self._begin(history)
        if n > len(self._tokens):
            self._tokens = np.concatenate([self._tokens[: self._read], np.empty(2 * n - self._read, dtype=np.int64)])
        self._tokens[self._read : n] = history[self._read :]
        self._read = n
        return self._tokens[:n]

    def seen(self, history: Sequence[int]) -> BoolArray:
        """Which tokens occur in it, shape [vocab_size]: an array that the next call may change."""
        n = self._begin(history)
        if n == self._marked + 1:  # as a rule: a tenth of the time
            if history[-1] < len(self._seen):
                self._seen[history[-1]] = True
        elif n > self._marked:
            new = np.array(history[self._marked :], dtype=np.int64)
            self._seen[new[new < len(self._seen)]] = True
        self._marked = n
        return self._seen

    def _begin(self, history: Sequence[int]) -> int:
        n = len(history)
        if n < self._length:
            self._read = self._marked = 0
            self._seen[:] = False
        self._length = n
        return n
