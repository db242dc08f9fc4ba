"""What a request asks of its new tokens besides how they are chosen: log-probabilities, and text that must not come."""

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
    """The tokens of one request between the sampler and its response.

    A token that may begin a banned string is held until that is settled. If the string comes, its tokens are taken back
    and the first of them is ruled out in its place; what was ruled out behind that place is allowed again.

    Args:
        request: what was asked for.
        decoder: gives a decoder for what follows some tokens.
        vocab_size: tokens that have a name.
    """

    def __init__(self, request: Request, decoder: Callable[[Sequence[int]], Decoder], vocab_size: int) -> None:
        self._request, self._vocab_size = request, vocab_size
        self._make_decoder, self._decoder = decoder, decoder(request.ids)
        # Upper and lower case are alike. Folding a text folds each of its characters, so pieces can be folded.
        self._banned = [text.casefold() for text in request.banned_strings]
        self._held: list[int] = []
        self._pieces: list[str] = []  # the text of each
        self._logprobs: list[TokenLogprobs] = []
        self._ready = 0  # how many of them are certain
        self._ruled_out: dict[int, set[int]] = {}  # by their place in the sequence

    def ruled_out(self, place: int) -> Collection[int]:
        """The tokens that must not be chosen in a place of the sequence, counted from 0."""
        return self._ruled_out.get(place, ())

    def logprobs(self, logits: Logits, token_id: int) -> TokenLogprobs | None:
        """The log-probabilities that were asked for of a token chosen from these logits, shape [vocabulary]."""
        count = self._request.logprobs
        return None if count is None else token_logprobs(logits, token_id, count, self._vocab_size)

    def take(self, ids: list[int], logprobs: TokenLogprobs | None) -> bool:
        """The last token of a sequence was chosen.

        Args:
            ids: the whole sequence; what is taken back is removed from it.
            logprobs: of the token, where they were asked for.

        Returns:
            Whether anything was.
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
        places = [at for string in self._banned if (at := text.find(string)) >= 0]
        if places:
            self._take_back(self._token_at(min(places)), ids)
            return True
        self._ready = self._token_at(len(text) - max(_overlap(text, string) for string in self._banned))
        first = len(ids) - len(self._held) + self._ready
        self._ruled_out = {place: some for place, some in self._ruled_out.items() if place >= first}
        return False

    def release(self, *, ended: bool) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """The tokens that have become certain, and their log-probabilities; all that are left, where it has ended."""
        count = len(self._held) if ended else self._ready
        released = tuple(self._held[:count]), tuple(self._logprobs[:count])
        for held in (self._held, self._pieces, self._logprobs):
            del held[:count]
        self._ready = 0
        return released

    def _take_back(self, index: int, ids: list[int]) -> None:
        """Remove the held tokens from one on, which is ruled out in its place."""
        place = len(ids) - len(self._held) + index
        self._ruled_out = {at: some for at, some in self._ruled_out.items() if at <= place}
        self._ruled_out.setdefault(place, set()).add(self._held[index])
        del ids[place:]
        for held in (self._held, self._pieces, self._logprobs):
            del held[index:]
        self._ready = min(self._ready, index)
        self._decoder = self._make_decoder(ids)

    def _token_at(self, at: int) -> int:
        """Which held token begins the character at this place of their text, or what comes behind the text.

        A character may be of several tokens, and the last of them brings its text.
        """
        ends = accumulate(map(len, self._pieces))
        index = next((i for i, end in enumerate(ends) if end > at), len(self._held))
        while index and not self._pieces[index - 1] and not self._decoder.special(self._held[index - 1]):
            index -= 1
        return index


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of a text that begins a string, but is not all of it."""
    for size in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:size]):
            return size
    return 0
