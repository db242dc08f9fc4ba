"""Choose the number of draft tokens from their acceptance rate and measured times of forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Draft lengths to choose from. Few, since each is another shape of forward pass to warm up.
LADDER = (1, 2, 3, 4, 5, 7, 9, 11, 15, 23, 31)

# Require a speedup larger than the error of the measured times.
_MARGIN = 1.02

# Assumed relative cost of one more token per row, for shapes not measured yet.
_GROWTH = 0.04

_FADE_TRIED, _FADE_IDLE, _FADE_SECONDS = 0.9, 0.99, 0.999
_PRIOR_WEIGHT = 2.0

# Report speculation as slower from this ratio of times on.
_SLOWER = 1.03


def agreeing(proposed: Sequence[int], chosen: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(proposed, chosen, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(proposed), len(chosen)))


class AcceptanceRate:
    """Exponentially weighted acceptance rate of draft tokens.

    Args:
        prior: initial rate, to which the estimate decays while nothing is drafted.
    """

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._right = self._tried = 0.0

    @property
    def value(self) -> float:
        return (self._right + _PRIOR_WEIGHT * self._prior) / (self._tried + _PRIOR_WEIGHT)

    def note(self, proposed: Sequence[int], chosen: Sequence[int]) -> int:
        """Update with draft tokens, verified or not, and the tokens sampled; returns how many agree.

        Each agreeing token counts as a success, and the first mismatch as a failure. Later ones show nothing.
        """
        right = agreeing(proposed, chosen)
        for _ in range(right):
            self._add(1.0)
        if right < min(len(proposed), len(chosen)):
            self._add(0.0)
        return right

    def _add(self, right: float) -> None:
        self._right, self._tried = self._right * _FADE_TRIED + right, self._tried * _FADE_TRIED + 1

    def fade(self) -> None:
        """Decay towards the prior after a token without a draft."""
        self._right, self._tried = self._right * _FADE_IDLE, self._tried * _FADE_IDLE


class AcceptanceEstimate(NamedTuple):
    """A sequence's expected acceptance: up to `length` draft tokens, each accepted with probability `rate`."""

    rate: float
    length: int

    def tokens(self, drafted: int) -> float:
        """Expected tokens from a forward pass with `drafted` draft tokens: 1 + rate + rate² + …"""
        expected, likely = 1.0, 1.0
        for _ in range(min(drafted, self.length)):
            likely *= self.rate
            expected += likely
        return expected


class Timing:
    """Running estimate of an operation's duration, robust to outliers and to results collected late."""

    def __init__(self) -> None:
        self._warm = False
        self.seconds = 0.0

    def note(self, seconds: float, waited: float) -> None:
        """Update with one measurement.

        Args:
            seconds: from submission until the result was collected.
            waited: the part of it that the caller spent waiting. If short, the device may have finished earlier.
        """
        if not self._warm:  # the first run may include graph capture and kernel tuning
            self._warm = True
        elif not self.seconds:
            self.seconds = seconds
        elif waited > seconds / 10:
            # Moving average; an outlier counts as at most twice the estimate.
            self.seconds += (min(seconds, 2 * self.seconds) - self.seconds) / 4
        else:
            # Only an upper bound of the duration.
            self.seconds = min(self.seconds, seconds)

    def fade(self) -> None:
        """Shrink the estimate of an operation that is being avoided, so that it is tried again some time."""
        self.seconds *= _FADE_SECONDS


class DraftLength:
    """Chooses the draft length from measured times of forward passes by their shape."""

    def __init__(self) -> None:
        self._timings: dict[tuple[int, int], Timing] = {}

    def note(self, rows: int, tokens: int, seconds: float, waited: float) -> None:
        """Record a forward pass over `rows` sequences of up to `tokens` tokens; see `Timing.note`."""
        self._timings.setdefault((rows, tokens), Timing()).note(seconds, waited)

    def seconds(self, rows: int, tokens: int) -> float:
        """Estimated duration of a pass, extrapolated from shorter ones if it was never measured; 0.0 if unknown."""
        for shorter in range(tokens, 0, -1):
            timing = self._timings.get((rows, shorter))
            if timing is not None and timing.seconds:
                return timing.seconds * (1 + _GROWTH * (tokens - shorter))
        return 0.0

    def choose(self, estimates: Sequence[AcceptanceEstimate], cost: float) -> int:
        """The draft length with the highest expected tokens per second for the next forward pass.

        Args:
            estimates: one for each sequence.
            cost: seconds to draft one more token for all of them.

        Returns:
            One of `LADDER`, or 0 if none beats a plain pass, or if a plain pass has not been timed yet.
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
    """Costs and gains of speculation for one sequence.

    Attributes:
        drafted: draft tokens verified.
        accepted: draft tokens accepted.
        seconds: time of drafting and forward passes.
        plain_seconds: estimated time of the same tokens without drafts.
    """

    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0

    def note(self, option: str) -> str:
        """A note for the user if speculation was slower than plain decoding, else empty.

        Args:
            option: the option that enabled it, as a `param` mark.
        """
        if not self.drafted or not self.plain_seconds or self.seconds <= _SLOWER * self.plain_seconds:
            return ""
        return (
            f"{option} made this {self.seconds / self.plain_seconds - 1:.0%} slower: {self.accepted} of {self.drafted} "
            "draft tokens were accepted"
        )
