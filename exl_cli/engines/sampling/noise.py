"""Counter-based random numbers: stateless functions of seed, position and token id.

They do not depend on the batch, the device or the order of computation. The generator is Philox4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is the seed; the counter is (token id // 4, position,
stream, 0), and each counter gives four 32-bit words, for four consecutive ids.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_HALF, _LOWER = np.uint64(32), np.uint64(0xFFFFFFFF)

_RACE, _UNIFORM = 0, 1  # streams


def exponential(seed: int, position: int, ids: IntArray) -> FloatArray:
    """Exponential noise of mean 1 for tokens at one position.

    Args:
        seed: any integer, reduced modulo 2**64.
        position: position in the sequence, from 0.
        ids: token ids, [n].

    Returns:
        [n], all above 0.
    """
    blocks = ids >> 2
    if 4 * len(ids) > (last := int(blocks.max()) + 1):  # dense ids: compute each block once
        words = philox(np.arange(last), position, _RACE, seed).T.reshape(-1)[ids]
    else:
        words = philox(blocks, position, _RACE, seed)[ids & 3, np.arange(len(ids))]
    points = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    noise: FloatArray = -np.log1p(-np.minimum(points, np.float32(1.0 - 2.0**-24)))
    return noise


def uniform(seed: int, position: int) -> float:
    """A uniform number in (0, 1) for a position, with 52 bits."""
    high, low, _, _ = philox(np.zeros(1, dtype=np.int64), position, _UNIFORM, seed)[:, 0].tolist()
    return float(((high << 20 | low >> 12) + 0.5) * 2.0**-52)


def philox(blocks: IntArray, position: int, stream: int, seed: int) -> Words:
    """Four random 32-bit words for each counter (block, position, stream, 0): [n] to [4, n]."""
    even = np.empty((2, len(blocks)), dtype=np.uint64)  # words 0 and 2 of the counter
    odd = np.zeros((2, len(blocks)), dtype=np.uint64)  # words 1 and 3
    even[0], even[1], odd[0] = blocks, stream, position
    for key in _round_keys(seed % 2**64):
        products = even * _MULTIPLIERS
        even = (products >> _HALF)[::-1] ^ odd ^ key
        odd = (products & _LOWER)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


@lru_cache(maxsize=1024)
def _round_keys(seed: int) -> Words:
    rounds = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]
    halves = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], dtype=np.uint64)
    keys: Words = (halves + rounds * np.array(_KEY_STEPS, dtype=np.uint64)[:, None]) & _LOWER
    return keys
