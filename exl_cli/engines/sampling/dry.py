"""DRY ("don't repeat yourself"): a penalty on the token that would continue a sequence already seen.

Source: p-e-w, text-generation-webui pull request 5677. The end of the history is looked up in what came before it; a
token that followed an earlier copy of its last n tokens loses `multiplier * base ** (n - allowed_length)`, if n is at
least `allowed_length`. Breakers end a match and are never penalized.

As in exllamav2, and unlike the pull request, only the longest match counts, and a token's penalty is multiplied by the
number of times it followed one. Two defects of exllamav2 0.3.2 are not repeated here:

- it leaves the last token out of what can follow a match, so a run of one token ("a a a a") is never penalized;
- its index ends where a match of `max_ngram` tokens does, so one that long or longer is not penalized at all; here it
  counts as one of `max_ngram` tokens.

The history is searched again for every token. In NumPy that takes some 20 microseconds at 8,000 tokens, less than it
would take Python to keep an index of n-grams up to date.
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

# Enough to rule a token out under any temperature, and far from float32's largest number.
_MAX_PENALTY = 1e30


def dry_breakers(
    pieces: Sequence[str], special: Collection[int], breakers: Collection[str] = BREAKER_CHARACTERS
) -> frozenset[int]:
    """The tokens that DRY does not match across, by exllamav2's rule.

    Args:
        pieces: the decoded text of every token, at the index of its id ("\\n", not the vocabulary's "Ċ" or "<0x0A>").
        special: ids of the special tokens, such as the end of sequence.
        breakers: text that makes a token one; the default is exllamav2's.

    Returns:
        The ids whose text contains one of the breakers, and all of `special`.
    """
    characters = {text for text in breakers if len(text) == 1}
    texts = [text for text in breakers if len(text) > 1]
    return frozenset(special).union(
        i for i, piece in enumerate(pieces) if not characters.isdisjoint(piece) or any(text in piece for text in texts)
    )


def token_mask(ids: Collection[int], size: int) -> BoolArray:
    """A mask of shape [size], True at `ids`; ids outside it are left out."""
    mask = np.zeros(size, dtype=np.bool_)
    mask[[i for i in ids if 0 <= i < size]] = True
    return mask


def longest_repeat(history: IntArray, breakers: BoolArray, reach: int, max_length: int) -> tuple[int, IntArray]:
    """Where the end of a history occurred before.

    Args:
        history: token ids, shape [n], oldest first.
        breakers: shape [vocab]; a match contains none of these tokens, nor any id beyond the vocabulary.
        reach: how many tokens before the last are searched; 0 is all of them.
        max_length: a longer match counts as one of this length.

    Returns:
        The length of the longest match (0 where there is none) and the positions right after each of its earlier
        occurrences, ascending.
    """
    n = len(history)
    first = max(0, n - 1 - reach) if reach else 0
    length, ends = 0, np.empty(0, dtype=np.int64)  # ends: the last positions of the earlier copies
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
    """Take the penalties off the logits (shape [vocab]), in place. For the rest see `longest_repeat`."""
    length, following = longest_repeat(history, breakers, settings.dry_range, settings.dry_max_ngram)
    if length < settings.dry_allowed_length:
        return
    tokens = history[following]
    tokens = tokens[tokens < len(logits)]
    tokens, counts = np.unique(tokens[~breakers[tokens]], return_counts=True)
    with np.errstate(over="ignore"):
        penalty = settings.dry_multiplier * np.float64(settings.dry_base) ** (length - settings.dry_allowed_length)
        logits[tokens] -= np.minimum(penalty * counts, _MAX_PENALTY).astype(np.float32)
