"""Prompt lookup: draft tokens copied from where the last few tokens occurred before, in the prompt or the response.

Saxena's prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from exl_cli.engines.exllamav2.draft_length import AcceptanceEstimate, AcceptanceRate
from exl_cli.engines.exllamav2.speculation import ChooseLength, DraftRequest, DraftTokens
from exl_cli.errors import param


@dataclass(eq=False)
class _Index:
    """Where each n-gram of a sequence occurred last."""

    places: dict[int, dict[tuple[int, ...], int]]
    rates: dict[int, AcceptanceRate]
    indexed: int = 0
    nothing: DraftTokens = field(default_factory=lambda: DraftTokens((), 0, AcceptanceRate(0.0)))


class PromptLookup:
    """Proposes what followed the last few tokens when they occurred before. See `speculation.Drafter`.

    Args:
        longest, shortest: how many tokens have to agree; the longest match wins.
    """

    option = f"{param('speculate')} ngram"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def begin(self, ids: list[int], positions: int) -> _Index:
        """See `Drafter.begin`."""
        # A longer match is right more often: at first only the longest are trusted.
        return _Index(
            {size: {} for size in self._sizes},
            {size: AcceptanceRate(0.7 if size == self._sizes[0] else 0.4) for size in self._sizes},
        )

    def propose(self, requests: Sequence[DraftRequest], choose: ChooseLength) -> list[DraftTokens]:
        """See `Drafter.propose`."""
        drafts = [self._draft(request) for request in requests]
        used = choose([AcceptanceEstimate(draft.rate.value, len(draft.tokens)) for draft in drafts], 0.0)
        return [DraftTokens(tokens, min(used, len(tokens)), rate) for tokens, _, rate in drafts]

    def end(self, draft: _Index, ids: list[int]) -> None:
        """See `Drafter.end`."""

    def reset(self) -> None:
        """See `Drafter.reset`."""

    def _draft(self, request: DraftRequest) -> DraftTokens:
        index: _Index | None = request.draft
        if index is None:
            return DraftTokens((), 0, AcceptanceRate(0.0))
        ids, end = request.ids, len(request.ids)
        # The last token has no follower yet.
        for last in range(index.indexed, end - 1):
            for size, places in index.places.items():
                if last + 1 >= size:
                    places[tuple(ids[last + 1 - size : last + 1])] = last + 1
        index.indexed = max(index.indexed, end - 1)
        for size, places in index.places.items() if request.most > 0 else ():
            place = places.get(tuple(ids[-size:]))
            if place is not None and end >= size:
                # Past the end of the sequence the draft continues itself: a period is repeated.
                tokens = (ids[place : place + request.most] * (1 + request.most // (end - place)))[: request.most]
                return DraftTokens(tuple(tokens), 0, index.rates[size])
        return index.nothing
