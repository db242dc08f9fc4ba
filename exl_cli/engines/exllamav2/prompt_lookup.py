"""Prompt lookup decoding: draft the tokens that followed the last few tokens when they occurred before.

Source: Apoorv Saxena, https://github.com/apoorvumang/prompt-lookup-decoding. Prompt and response are searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from exl_cli.engines.exllamav2.draft_length import AcceptanceEstimate, AcceptanceRate
from exl_cli.engines.exllamav2.speculation import ChooseLength, DraftRequest, DraftTokens
from exl_cli.errors import param


@dataclass(eq=False)
class _Index:
    """N-gram index of one sequence: for each size, n-gram to the position after its last occurrence."""

    followers: dict[int, dict[tuple[int, ...], int]]
    rates: dict[int, AcceptanceRate]
    indexed: int = 0
    nothing: DraftTokens = field(default_factory=lambda: DraftTokens((), 0, AcceptanceRate(0.0)))


class PromptLookup:
    """Drafts by prompt lookup. See `speculation.Drafter`.

    Args:
        longest, shortest: n-gram sizes to match; longer matches are preferred.
    """

    option = f"{param('speculate')} ngram"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def begin(self, ids: list[int], positions: int) -> _Index:
        # Longer matches are more reliable; start with little trust in shorter ones.
        return _Index(
            {size: {} for size in self._sizes},
            {size: AcceptanceRate(0.7 if size == self._sizes[0] else 0.4) for size in self._sizes},
        )

    def propose(self, requests: Sequence[DraftRequest], choose: ChooseLength) -> list[DraftTokens]:
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
        # Index the n-grams that end at each new token, except the last one, which has no follower yet.
        for last in range(index.indexed, end - 1):
            for size, followers in index.followers.items():
                if last + 1 >= size:
                    followers[tuple(ids[last + 1 - size : last + 1])] = last + 1
        index.indexed = max(index.indexed, end - 1)
        for size, followers in index.followers.items() if request.most > 0 else ():
            start = followers.get(tuple(ids[-size:]))
            if start is not None and end >= size:
                # If fewer tokens follow than can be used, repeat them: the sequence is likely periodic.
                tokens = (ids[start : start + request.most] * (1 + request.most // (end - start)))[: request.most]
                return DraftTokens(tuple(tokens), 0, index.rates[size])
        return index.nothing
