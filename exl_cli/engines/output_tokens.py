"""Between sampler and response: log-probabilities of new tokens, and banned strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.response import Decoder
from exl_cli.engines.sampling.logprobs import token_logprobs

Logits = npt.NDArray[np.float32]


class OutputTokens:
    """Queue of a request's sampled tokens, with rewinding when a banned string is completed.

    A token that may begin a banned string is held back. If the string is completed, the sequence is cut before the
    string's first token, and that token is banned at that position. Bans at later positions are lifted, since the
    sequence before them has changed.

    Args:
        request: the request.
        decoder: makes an incremental decoder for the tokens after a given sequence.
        vocab_size: size of the tokenizer's vocabulary.
    """

    def __init__(self, request: Request, decoder: Callable[[Sequence[int]], Decoder], vocab_size: int) -> None:
        self._request, self._vocab_size = request, vocab_size
        self._make_decoder, self._decoder = decoder, decoder(request.ids)
        # Casefolding works character by character, so folded pieces concatenate to the folded text.
        self._banned = [text.casefold() for text in request.banned_strings]
        self._held: list[int] = []
        self._pieces: list[str] = []  # decoded, casefolded text of each held token
        self._logprobs: list[TokenLogprobs] = []
        self._ready = 0  # the first so many held tokens can be released
        self._ruled_out: dict[int, set[int]] = {}  # by position in the sequence

    def ruled_out(self, position: int) -> Collection[int]:
        """Tokens banned at a position of the sequence, counted from 0."""
        return self._ruled_out.get(position, ())

    def logprobs(self, logits: Logits, token_id: int) -> TokenLogprobs | None:
        """Log-probabilities of a token sampled from these logits, [vocabulary]; None if not requested."""
        count = self._request.logprobs
        return None if count is None else token_logprobs(logits, token_id, count, self._vocab_size)

    def take(self, ids: list[int], logprobs: TokenLogprobs | None) -> bool:
        """Take the newest token of a sequence.

        Args:
            ids: the whole sequence, cut in place when it rewinds.
            logprobs: the token's, if requested.

        Returns:
            Whether it rewound.
        """
        self._held.append(ids[-1])
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if not self._banned or ids[-1] in self._request.stop_ids:
            self._pieces.append("")
            self._ready = len(self._held)
            return False
        self._pieces.append(self._decoder.push(ids[-1]).casefold())
        text = "".join(self._pieces)
        starts = [start for string in self._banned if (start := text.find(string)) >= 0]
        if starts:
            self._rewind(self._token_at(min(starts)), ids)
            return True
        self._ready = self._token_at(len(text) - max(_overlap(text, string) for string in self._banned))
        # Positions that are certain need no bans any more.
        first = len(ids) - len(self._held) + self._ready
        self._ruled_out = {position: tokens for position, tokens in self._ruled_out.items() if position >= first}
        return False

    def release(self, *, ended: bool) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """Remove and return the tokens that are certain, with their log-probabilities; all of them if it has ended."""
        count = len(self._held) if ended else self._ready
        released = tuple(self._held[:count]), tuple(self._logprobs[:count])
        for held in (self._held, self._pieces, self._logprobs):
            del held[:count]
        self._ready = 0
        return released

    def _rewind(self, index: int, ids: list[int]) -> None:
        """Cut the sequence before held token `index`, and ban that token there."""
        position = len(ids) - len(self._held) + index
        self._ruled_out = {at: tokens for at, tokens in self._ruled_out.items() if at <= position}
        self._ruled_out.setdefault(position, set()).add(self._held[index])
        del ids[position:]
        for held in (self._held, self._pieces, self._logprobs):
            del held[index:]
        self._ready = min(self._ready, index)
        self._decoder = self._make_decoder(ids)

    def _token_at(self, offset: int) -> int:
        """Index of the first held token of the character at an offset of their text."""
        ends = accumulate(map(len, self._pieces))
        index = next((i for i, end in enumerate(ends) if end > offset), len(self._held))
        # A character's text comes with its last token; earlier ones have empty pieces, as special tokens do.
        while index and not self._pieces[index - 1] and not self._decoder.special(self._held[index - 1]):
            index -= 1
        return index


def _overlap(text: str, string: str) -> int:
    """Length of the longest proper prefix of `string` that `text` ends with."""
    for size in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:size]):
            return size
    return 0
