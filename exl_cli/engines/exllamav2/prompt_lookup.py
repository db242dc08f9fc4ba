"""Speculation without a second model: what followed the last few tokens when they occurred before.

That is Saxena's prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), over the response as
well as the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from exl_cli.engines.exllamav2.draft_length import Outlook, Rate
from exl_cli.engines.exllamav2.speculation import Choose, Guess, Wanted


@dataclass(eq=False)
class _Index:
    """Where each n-gram of a sequence occurred last."""

    places: dict[int, dict[tuple[int, ...], int]]
    rates: dict[int, Rate]
    indexed: int = 0
    nothing: Guess = field(default_factory=lambda: Guess((), 0, Rate(0.0)))


class Ngrams:
    """Proposes what followed the last few tokens when they occurred before, in the prompt or in the response.

    Args:
        longest, shortest: how many tokens have to agree; the longest match counts.
    """

    flag = "--speculate ngram"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def begin(self, ids: list[int], positions: int) -> _Index:
        """See `Drafter.begin`."""
        # A longer match is more often right: so at first only the longest ones are trusted.
        return _Index(
            {size: {} for size in self._sizes},
            {size: Rate(0.7 if size == self._sizes[0] else 0.4) for size in self._sizes},
        )

    def propose(self, wanted: Sequence[Wanted], choose: Choose) -> list[Guess]:
        """See `Drafter.propose`."""
        guesses = [self._guess(one) for one in wanted]
        used = choose([Outlook(guess.rate.value, len(guess.tokens)) for guess in guesses], 0.0)
        return [Guess(tokens, min(used, len(tokens)), rate) for tokens, _, rate in guesses]

    def end(self, draft: _Index, ids: list[int]) -> None:
        """See `Drafter.end`."""

    def reset(self) -> None:
        """See `Drafter.reset`."""

    def _guess(self, wanted: Wanted) -> Guess:
        index: _Index = wanted.draft
        ids, end = wanted.ids, len(wanted.ids)
        # The last token has no follower yet.
        for last in range(index.indexed, end - 1):
            for size, places in index.places.items():
                if last + 1 >= size:
                    places[tuple(ids[last + 1 - size : last + 1])] = last + 1
        index.indexed = max(index.indexed, end - 1)
        for size, places in index.places.items() if wanted.most > 0 else ():
            place = places.get(tuple(ids[-size:]))
            if place is not None and end >= size:
                # Beyond the end it goes on with its own proposals: a period is repeated.
                tokens = (ids[place : place + wanted.most] * (1 + wanted.most // (end - place)))[: wanted.most]
                return Guess(tuple(tokens), 0, index.rates[size])
        return index.nothing
