"""DRY ("don't repeat yourself"): penalize tokens that would extend a repetition.

Source: p-e-w, text-generation-webui pull request 5677. If the last n tokens of the history occurred before, the token
that followed them there loses `multiplier * base ** (n - allowed_length)` for n >= `allowed_length`. Sequence breakers
end a match and are never penalized.

Like exllamav2 and unlike the pull request, we use only the longest match, and multiply a token's penalty by the number
of times it followed one. Two defects of exllamav2 0.3.2 are fixed:

- it excludes the last token as a continuation, so a run of one token ("a a a a") is never penalized;
- matches of `max_ngram` or more tokens are not penalized at all. Here they count as `max_ngram`.

Every token triggers a full search of the history: about 20 microseconds in NumPy for 8,000 tokens, less than updating
an n-gram index in Python.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from exl_cli.sampling import Sampling

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

BREAKER_CHARACTERS = frozenset('.,!?<>[](){}\n\t"')

# Bans a token at any temperature without overflowing float32.
_MAX_PENALTY = 1e30


def dry_breakers(
    pieces: Sequence[str], special: Collection[int], breakers: Collection[str] = BREAKER_CHARACTERS
) -> frozenset[int]:
    """Ids of the sequence breakers: special tokens, and tokens whose text contains a breaker (exllamav2's rule).

    Args:
        pieces: decoded text of each token by id ("\\n", not the vocabulary's "Ċ" or "<0x0A>").
        special: ids of the special tokens.
        breakers: breaker strings; exllamav2's by default.
    """
    characters = {text for text in breakers if len(text) == 1}
    texts = [text for text in breakers if len(text) > 1]
    return frozenset(special).union(
        i for i, piece in enumerate(pieces) if not characters.isdisjoint(piece) or any(text in piece for text in texts)
    )


def token_mask(ids: Collection[int], size: int) -> BoolArray:
    """Boolean mask [size], True at `ids`; ids out of range are ignored."""
    mask = np.zeros(size, dtype=np.bool_)
    mask[[i for i in ids if 0 <= i < size]] = True
    return mask


def longest_repeat(history: IntArray, breakers: BoolArray, reach: int, max_length: int) -> tuple[int, IntArray]:
    """Find the longest suffix of the history that occurred before.

    Args:
        history: token ids, [n].
        breakers: mask [vocab]; a match contains no breaker and no id beyond the vocabulary.
        reach: how many tokens before the last to search; 0 for all.
        max_length: longest match to look for.

    Returns:
        The match's length, 0 if there is none, and the ascending positions right after its earlier occurrences.
    """
    # Extend the match leftwards one token at a time, keeping the occurrences that still match.
    n = len(history)
    first = max(0, n - 1 - reach) if reach else 0
    length, ends = 0, np.empty(0, dtype=np.int64)  # last positions of the earlier occurrences
    while length < max_length and n > 1:
        token = history[n - 1 - length]
        if token >= len(breakers) or breakers[token]:
            break
        if length == 0:
            longer = np.flatnonzero(history[first : n - 1] == token) + first
        else:
            longer = ends[ends - length >= first]
            longer = longer[history[longer - length] == token]
        if not longer.size:
            break
        length, ends = length + 1, longer
    return length, ends + 1


def apply_dry(logits: FloatArray, history: IntArray, breakers: BoolArray, settings: Sampling) -> None:
    """Subtract the penalties from the logits [vocab] in place. `history` and `breakers` as in `longest_repeat`."""
    length, following = longest_repeat(history, breakers, settings.dry_range, settings.dry_max_ngram)
    if length < settings.dry_allowed_length:
        return
    tokens = history[following]
    tokens = tokens[tokens < len(logits)]
    tokens, counts = np.unique(tokens[~breakers[tokens]], return_counts=True)
    with np.errstate(over="ignore"):
        penalty = settings.dry_multiplier * np.float64(settings.dry_base) ** (length - settings.dry_allowed_length)
        logits[tokens] -= np.minimum(penalty * counts, _MAX_PENALTY).astype(np.float32)
