"""Whether speculation pays: how often proposals are right, how long passes take, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Numbers of proposed tokens to choose from: each is a shape of pass that the device has to be warmed up for.
LADDER = (1, 2, 3, 4, 5, 7, 9, 11, 15, 23, 31)

# A gain that is less than the error of the times measured is none.
_MARGIN = 1.02

# How much longer a pass is thought to take with one more token in each row, until it is measured.
_GROWTH = 0.04

_FADE_TRIED, _FADE_IDLE, _FADE_SECONDS = 0.9, 0.99, 0.999
_PRIOR_WEIGHT = 2.0

# From which ratio on the times measured say that something was slower.
_SLOWER = 1.03


def agreeing(proposed: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens are the same from the first one on."""
    pairs = enumerate(zip(proposed, chosen, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(proposed), len(chosen)))


class Rate:
    """How often the next proposed token is the right one, lately.

    Args:
        prior: what to think of it before anything is seen, and again when nothing has been seen for long.
    """

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._right = self._tried = 0.0

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return (self._right + _PRIOR_WEIGHT * self._prior) / (self._tried + _PRIOR_WEIGHT)

    def note(self, proposed: Sequence[int], chosen: Sequence[int]) -> int:
        """Compare proposals with what was chosen then, whether they were computed or not; how many were right."""
        right = agreeing(proposed, chosen)
        for _ in range(right):
            self._add(1.0)
        if right < min(len(proposed), len(chosen)):
            self._add(0.0)
        return right

    def _add(self, right: float) -> None:
        self._right, self._tried = self._right * _FADE_TRIED + right, self._tried * _FADE_TRIED + 1

    def fade(self) -> None:
        """A token came that nothing had been proposed for."""
        self._right, self._tried = self._right * _FADE_IDLE, self._tried * _FADE_IDLE


class Outlook(NamedTuple):
    """What can be expected of one sequence: at most `length` proposals, each right with the probability `rate`."""

    rate: float
    length: int

    def tokens(self, proposals: int) -> float:
        """Tokens that a pass is expected to give with at most so many proposals."""
        expected, likely = 1.0, 1.0
        for _ in range(min(proposals, self.length)):
            likely *= self.rate
            expected += likely
        return expected


class Timing:
    """How long something takes that is done again and again."""

    def __init__(self) -> None:
        self._warm = False
        self.seconds = 0.0

    def note(self, seconds: float, waited: float) -> None:
        """It was done once more.

        Args:
            seconds: from its beginning until it was seen to be done.
            waited: how many of them the caller waited; if none, it may have been done before.
        """
        if not self._warm:  # the first time a graph may be captured, or kernels tried out
            self._warm = True
        elif not self.seconds:
            self.seconds = seconds
        elif waited > seconds / 10:
            self.seconds += (min(seconds, 2 * self.seconds) - self.seconds) / 4
        else:
            self.seconds = min(self.seconds, seconds)

    def fade(self) -> None:
        """It was not done, for it seems to take too long: some day it should be seen again."""
        self.seconds *= _FADE_SECONDS


class Pace:
    """How long passes take by their shape, and so how many proposals pay."""

    def __init__(self) -> None:
        self._timings: dict[tuple[int, int], Timing] = {}

    def note(self, rows: int, tokens: int, seconds: float, waited: float) -> None:
        """A pass over so many rows of at most so many tokens came back; see `Timing.note`."""
        self._timings.setdefault((rows, tokens), Timing()).note(seconds, waited)

    def seconds(self, rows: int, tokens: int) -> float:
        """What such a pass takes; where none was seen, a guess from shorter ones; 0.0 where there are none."""
        for shorter in range(tokens, 0, -1):
            timing = self._timings.get((rows, shorter))
            if timing is not None and timing.seconds:
                return timing.seconds * (1 + _GROWTH * (tokens - shorter))
        return 0.0

    def choose(self, outlooks: Sequence[Outlook], cost: float) -> int:
        """How many tokens to propose at most for each sequence of the next pass.

        Args:
            outlooks: of each sequence.
            cost: seconds that one more proposal for all of them takes.

        Returns:
            One of `LADDER`, or 0 where nothing is gained; 0, too, until the time of a plain pass is known.
        """
        rows = len(outlooks)
        plain = self.seconds(rows, 1)
        longest = max((outlook.length for outlook in outlooks), default=0)
        if not plain or not longest:
            return 0
        best, highest = 0, _MARGIN * rows / plain
        for proposals in LADDER:
            if proposals > longest:
                break
            seconds = self.seconds(rows, 1 + proposals) + cost * proposals
            speed = sum(outlook.tokens(proposals) for outlook in outlooks) / seconds
            if speed > highest:
                best, highest = proposals, speed
        if not best:
            for (passed, tokens), timing in self._timings.items():
                if passed == rows and tokens > 1:
                    timing.fade()
        return best


@dataclass
class Account:
    """What speculation brought one sequence.

    Attributes:
        drafted: tokens proposed and computed.
        accepted: how many of them became part of the text.
        seconds: what proposing and the passes took.
        plain_seconds: what passes without proposals would have taken for the same tokens.
    """

    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0

    def note(self, flag: str) -> str:
        """What the user should know: that it was slower; else nothing.

        Args:
            flag: what asked for it.
        """
        if not self.drafted or not self.plain_seconds or self.seconds <= _SLOWER * self.plain_seconds:
            return ""
        return (
            f"{flag} made this {self.seconds / self.plain_seconds - 1:.0%} slower: {self.accepted} of {self.drafted} "
            "proposed tokens were right"
        )
