"""Speculative decoding: draft tokens are proposed cheaply and verified, several at once, in one forward pass.

Decoding reads all weights for each token, so a forward pass over a few tokens takes little longer than over one. The
sampler goes through the pass position by position; as long as it chooses the draft tokens, the next position's logits
are valid. The text is therefore what the model would have written alone, and so are the random numbers drawn for it, up
to near ties: a pass over several tokens rounds differently.

The number of draft tokens is chosen before each pass (`draft_length`), and is 0 where they do not pay. They come from
`prompt_lookup` or `draft_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from exl_cli.engines.exllamav2.draft_length import LADDER, AcceptanceEstimate, AcceptanceRate, DraftLength
from exl_cli.engines.exllamav2.sequence import Sequence as TokenSequence
from exl_cli.engines.response import Step


class DraftTokens(NamedTuple):
    """Draft tokens of one sequence.

    Attributes:
        tokens: the draft.
        used: how many of them to verify.
        rate: the acceptance rate to update.
    """

    tokens: tuple[int, ...]
    used: int
    rate: AcceptanceRate


class DraftRequest(NamedTuple):
    """A request for draft tokens for one sequence.

    Attributes:
        draft: the result of `Drafter.begin`; None for no draft tokens.
        ids: the sequence's tokens so far.
        most: most draft tokens that can be used.
    """

    draft: Any
    ids: list[int]
    most: int


ChooseLength = Callable[[Sequence[AcceptanceEstimate], float], int]


class Drafter(Protocol):
    """A source of draft tokens.

    Attributes:
        option: the option that enables it, as a `param` mark.
    """

    option: str

    def begin(self, ids: list[int], positions: int) -> Any:
        """Start a sequence whose prompt has been prefilled.

        Args:
            ids: its tokens.
            positions: the most positions it may reach.

        Returns:
            The drafter's state of the sequence, for `propose` and `end`; None if it cannot draft for it.
        """
        ...

    def propose(self, requests: Sequence[DraftRequest], choose: ChooseLength) -> list[DraftTokens]:
        """Draft tokens for the sequences of the next pass, in order. `choose` is `DraftLength.choose`."""
        ...

    def end(self, draft: Any, ids: list[int]) -> None:
        """End a sequence; `ids` are its final tokens."""
        ...

    def reset(self) -> None:
        """Drop all sequences."""
        ...


class Speculation:
    """Connects a drafter with the scheduler, and measures what it gains.

    Args:
        drafter: the source of draft tokens.
        max_batch, max_tokens: see `ModelRunner`.
        clock: current time in seconds.
    """

    def __init__(self, drafter: Drafter, max_batch: int, max_tokens: int, clock: Callable[[], float]) -> None:
        self._drafter = drafter
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._clock = clock
        self._length = DraftLength()
        self._shape = (0, 0)
        self._submitted: float | None = None
        self._drafting = 0.0

    def begin(self, sequence: TokenSequence) -> None:
        """Start a sequence whose prompt has been prefilled."""
        start = self._clock()
        sequence.draft = self._drafter.begin(sequence.ids, sequence.max_tokens)
        sequence.statistics.seconds += self._clock() - start

    def most_draft_tokens(self, count: int) -> int:
        """The most draft tokens of each sequence that a pass of so many can verify."""
        most = self._max_tokens if count == 1 else max(self._max_batch, self._max_tokens) // count
        return min(most - 1, LADDER[-1])

    def draft(self, sequences: Sequence[TokenSequence], *, busy: bool) -> list[DraftTokens]:
        """Draft tokens for the sequences of the next forward pass.

        Args:
            sequences: the sequences of the pass; their block tables bound the number of draft tokens.
            busy: the device still has a prefill to do, so the pass cannot be timed.
        """
        start = self._clock()
        count = len(sequences)
        most = self.most_draft_tokens(count)
        requests = [
            DraftRequest(s.draft, s.ids, max(min(most, s.max_draft_tokens, s.blocks.capacity - len(s.ids)), 0))
            for s in sequences
        ]
        drafts = self._drafter.propose(requests, self._length.choose)
        self._shape = (count, 1 + max(draft.used for draft in drafts))
        now = self._clock()
        self._submitted, self._drafting = None if busy else now, now - start
        return drafts

    def collected(self, since: float) -> None:
        """Record the time of the pass just collected; waiting for it began at `since`."""
        if self._submitted is not None:
            now = self._clock()
            self._length.note(*self._shape, now - self._submitted, now - since)

    def outcome(self, sequence: TokenSequence, draft: DraftTokens, chosen: Sequence[int]) -> Step:
        """The step of a sequence, given its draft and the tokens sampled in the pass."""
        accepted = min(draft.rate.note(draft.tokens, chosen), draft.used)
        statistics, plain = sequence.statistics, self._length.seconds(self._shape[0], 1)
        statistics.drafted += draft.used
        statistics.accepted += accepted
        if plain:
            statistics.seconds += self._length.seconds(*self._shape) + self._drafting
            statistics.plain_seconds += plain * len(chosen)
        return Step(tuple(chosen), None, 0, draft.used, accepted, statistics.note(self._drafter.option))

    def end(self, sequence: TokenSequence) -> None:
        """End a sequence, or put it back into the queue."""
        if sequence.draft is not None:
            draft, sequence.draft = sequence.draft, None
            self._drafter.end(draft, sequence.ids)

    def reset(self) -> None:
        """Drop all sequences."""
        self._drafter.reset()
