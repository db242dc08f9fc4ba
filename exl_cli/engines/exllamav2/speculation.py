"""Speculation: tokens that are proposed cheaply and verified, several at once, in one pass of the model.

Decoding reads all weights for each token, so a pass over a few tokens takes little longer than one over one. The
sampler goes through the pass position by position; as long as it chooses what was proposed, the next position's logits
are valid. The text is therefore the one that the model would have written alone, and so are the random numbers drawn
for it, up to near ties: a pass over several tokens rounds differently.

How many tokens to propose is decided anew for each pass (`pace`); where it does not pay, none. Who proposes them is in
`ngrams` and `drafting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.draft_length import Outlook, Pace, Rate
from exl_cli.engines.exllamav2.sequence import Sequence as TokenSequence


class Guess(NamedTuple):
    """Proposals for one sequence.

    Attributes:
        tokens: what may come next.
        used: how many of them are to be computed.
        rate: what to tell of the outcome.
    """

    tokens: tuple[int, ...]
    used: int
    rate: Rate


class Wanted(NamedTuple):
    """A sequence that proposals are wanted for.

    Attributes:
        draft: what `Drafter.begin` gave; None for no proposals.
        ids: its tokens so far.
        most: the most proposals that can be used.
    """

    draft: Any
    ids: list[int]
    most: int


Choose = Callable[[Sequence[Outlook], float], int]


class Drafter(Protocol):
    """Whoever proposes tokens.

    Attributes:
        flag: what asks for it, as the user writes it.
    """

    flag: str

    def begin(self, ids: list[int], positions: int) -> Any:
        """A sequence's prompt is in the cache.

        Args:
            ids: its tokens.
            positions: the most tokens that it can come to.

        Returns:
            What stands for it in `propose`; None where nothing can be proposed.
        """
        ...

    def propose(self, wanted: Sequence[Wanted], choose: Choose) -> list[Guess]:
        """Proposals for the sequences of the next pass, in order; how many, `choose` says (`Pace.choose`)."""
        ...

    def end(self, draft: Any, ids: list[int]) -> None:
        """A sequence has ended, with these tokens."""
        ...

    def reset(self) -> None:
        """Forget everything: an interruption may have come anywhere."""
        ...


class Speculation:
    """A drafter at work for a scheduler.

    Args:
        drafter: proposes the tokens.
        max_batch, max_tokens: see `ModelRunner`.
        clock: seconds that pass.
    """

    def __init__(self, drafter: Drafter, max_batch: int, max_tokens: int, clock: Callable[[], float]) -> None:
        self._drafter = drafter
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._clock = clock
        self._pace = Pace()
        self._shape = (0, 0)
        self._submitted: float | None = None
        self._drafting = 0.0

    def begin(self, sequence: TokenSequence) -> None:
        """A sequence's prompt is in the cache."""
        start = self._clock()
        sequence.draft = self._drafter.begin(sequence.ids, sequence.positions)
        sequence.account.seconds += self._clock() - start

    def guesses(self, sequences: Sequence[TokenSequence], *, busy: bool) -> list[Guess]:
        """What to verify in the next pass, for each of its sequences.

        Args:
            sequences: these.
            busy: the device has prompts to evaluate first, so that how long the pass takes says nothing.
        """
        start = self._clock()
        count = len(sequences)
        most = (self._max_tokens if count == 1 else max(self._max_batch, self._max_tokens) // count) - 1
        # The last new token is not computed, and so nothing is to follow it.
        wanted = [Wanted(one.draft, one.ids, max(min(most, one.room - 1), 0)) for one in sequences]
        guesses = self._drafter.propose(wanted, self._pace.choose)
        self._shape = (count, 1 + max(guess.used for guess in guesses))
        now = self._clock()
        self._submitted, self._drafting = None if busy else now, now - start
        return guesses

    def collected(self, since: float) -> None:
        """The pass of the last guesses is back; it was waited for since that time."""
        if self._submitted is not None:
            now = self._clock()
            self._pace.note(*self._shape, now - self._submitted, now - since)

    def outcome(self, sequence: TokenSequence, guess: Guess, chosen: Sequence[int]) -> Step:
        """Tokens that a pass gave a sequence, and how its proposals did."""
        right = min(guess.rate.note(guess.tokens, chosen), guess.used)
        account, plain = sequence.account, self._pace.seconds(self._shape[0], 1)
        account.drafted += guess.used
        account.accepted += right
        if plain:
            account.seconds += self._pace.seconds(*self._shape) + self._drafting
            account.plain_seconds += plain * len(chosen)
        return Step(tuple(chosen), None, 0, guess.used, right, account.note(self._drafter.flag))

    def end(self, sequence: TokenSequence) -> None:
        """A sequence has ended."""
        if sequence.draft is not None:
            draft, sequence.draft = sequence.draft, None
            self._drafter.end(draft, sequence.ids)

    def reset(self) -> None:
        """Forget what was known of sequences."""
        self._drafter.reset()
