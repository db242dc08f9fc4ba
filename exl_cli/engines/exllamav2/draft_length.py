"""How many draft tokens pay: from how often they are accepted and how long forward passes take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Numbers of draft tokens to choose from: each is a shape of forward pass that the device has to be warmed up for.
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
    """How many tokens agree from the first one on."""
    pairs = enumerate(zip(proposed, chosen, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(proposed), len(chosen)))


class AcceptanceRate:
    """How often a draft token has been accepted lately, as a fading average.

    Args:
        prior: the rate assumed before any is seen, and returned to when none has been seen for long.
    """

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._right = self._tried = 0.0

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return (self._right + _PRIOR_WEIGHT * self._prior) / (self._tried + _PRIOR_WEIGHT)

    def note(self, proposed: Sequence[int], chosen: Sequence[int]) -> int:
        """Compare draft tokens, computed or not, with what was sampled; returns how many were right."""
        right = agreeing(proposed, chosen)
        for _ in range(right):
            self._add(1.0)
        if right < min(len(proposed), len(chosen)):
            self._add(0.0)
        return right

    def _add(self, right: float) -> None:
        self._right, self._tried = self._right * _FADE_TRIED + right, self._tried * _FADE_TRIED + 1

    def fade(self) -> None:
        """A token was sampled without a draft."""
        self._right, self._tried = self._right * _FADE_IDLE, self._tried * _FADE_IDLE


class AcceptanceEstimate(NamedTuple):
    """What to expect of one sequence: at most `length` draft tokens, each accepted with the probability `rate`."""

    rate: float
    length: int

    def tokens(self, drafted: int) -> float:
        """Expected tokens of a forward pass with at most so many draft tokens."""
        expected, likely = 1.0, 1.0
        for _ in range(min(drafted, self.length)):
            likely *= self.rate
            expected += likely
        return expected


class Timing:
    """How long a repeated operation takes, robust to outliers and to times that were not waited for."""

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
        """It seems to take too long to be done: let the estimate shrink until it is tried again."""
        self.seconds *= _FADE_SECONDS


class DraftLength:
    """Chooses the draft length from measured times of forward passes by their shape."""

    def __init__(self) -> None:
        self._timings: dict[tuple[int, int], Timing] = {}

    def note(self, rows: int, tokens: int, seconds: float, waited: float) -> None:
        """A forward pass over so many rows of at most so many tokens came back; see `Timing.note`."""
        self._timings.setdefault((rows, tokens), Timing()).note(seconds, waited)

    def seconds(self, rows: int, tokens: int) -> float:
        """What such a pass takes; where none was seen, a guess from shorter ones; 0.0 where there are none."""
        for shorter in range(tokens, 0, -1):
            timing = self._timings.get((rows, shorter))
            if timing is not None and timing.seconds:
                return timing.seconds * (1 + _GROWTH * (tokens - shorter))
        return 0.0

    def choose(self, estimates: Sequence[AcceptanceEstimate], cost: float) -> int:
        """The most draft tokens for each sequence of the next forward pass that still pay.

        Args:
            estimates: of each sequence.
            cost: seconds that one more draft token for each of them takes.

        Returns:
            One of `LADDER`, or 0 where nothing is gained; 0, too, until the time of a plain pass is known.
        """
        rows = len(estimates)
        plain = self.seconds(rows, 1)
        longest = max((estimate.length for estimate in estimates), default=0)
        if not plain or not longest:
            return 0
        best, highest = 0, _MARGIN * rows / plain
        for length in LADDER:
            if length > longest:
                break
            seconds = self.seconds(rows, 1 + length) + cost * length
            speed = sum(estimate.tokens(length) for estimate in estimates) / seconds
            if speed > highest:
                best, highest = length, speed
        if not best:
            for (passed, tokens), timing in self._timings.items():
                if passed == rows and tokens > 1:
                    timing.fade()
        return best


@dataclass
class SpeculationStatistics:
    """What speculation cost and brought one sequence.

    Attributes:
        drafted: draft tokens computed.
        accepted: those of them that became part of the text.
        seconds: spent on drafting and forward passes.
        plain_seconds: what the same tokens would have taken without drafts.
    """

    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0

    def note(self, option: str) -> str:
        """Tells the user where it was slower; empty otherwise.

        Args:
            option: what asked for it, with its `param`.
        """
        if not self.drafted or not self.plain_seconds or self.seconds <= _SLOWER * self.plain_seconds:
            return ""
        return (
            f"{option} made this {self.seconds / self.plain_seconds - 1:.0%} slower: {self.accepted} of {self.drafted} "
            "proposed tokens were right"
        )
