"""What exllamav2 makes of packed weights at load, written down from the comments of its `quant/qdq_*.cuh` (0.3.2).

Within each 32 rows of a column the numbers keep their width, but change places: two neighbours come to lie 16 bits
apart in one word.
"""

from __future__ import annotations

import torch
from torch import Tensor

# For each width: how many rows make a unit, and of each word of it, the rows from the lowest bits on, even ones first;
# their odd neighbours lie 16 bits higher. Of 3, 5 and 6 bits the last numbers are spread over what the words have left.
_UNITS = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16}


def _place(bits: int) -> list[list[tuple[int, int]]]:
    """For each number of a unit, for each of its bits: the word, and the bit in it."""
    even: dict[int, list[list[int]]] = {
        2: [[0, 2, 4, 6, 8, 10, 12, 14]],
        3: [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18], [20, 22, 24, 26, 28]],
        4: [[0, 2, 4, 6]],
        5: [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18, 20, 22], [24, 26, 28]],
        6: [[0, 2], [4, 6], [8, 10]],
    }
    where: list[list[tuple[int, int]]] = [[] for _ in range(_UNITS[bits])]
    for word, numbers in enumerate(even[bits]):
        for slot, number in enumerate(numbers):
            for odd in (0, 1):
                where[number + odd] = [(word, 16 * odd + slot * bits + bit) for bit in range(bits)]
    for odd in (0, 1):
        if bits in (3, 5):
            where[30 + odd] = [(word, 16 * odd + 15) for word in range(bits)]
        if bits == 6:
            # dddd…, cccc… in the first word, ffff…, eeee… in the second, two bits of each in the third.
            for number, word, at in ((12, 0, 12), (14, 1, 14)):
                low = [(word, 16 * odd + 12 + bit) for bit in range(4)]
                where[number + odd] = low + [(2, 16 * odd + at + bit) for bit in range(2)]
    return where


def shuffle(words: Tensor, bits: int) -> Tensor:
    """Reorder packed weights of one width: int32 of shape (rows * bits / 32, columns)."""
    if bits == 8:
        return words
    size = _UNITS[bits] * bits // 32
    units = (words.to(torch.int64) & 0xFFFFFFFF).view(-1, size, words.shape[1])
    out = torch.zeros_like(units)
    for number, targets in enumerate(_place(bits)):
        for bit, (word, at) in enumerate(targets):
            source = number * bits + bit
            value = units[:, source // 32] >> (source % 32) & 1
            out[:, word] |= value << at
    signed = torch.where(out >= 1 << 31, out - (1 << 32), out)
    return signed.view(-1, words.shape[1]).to(torch.int32)


def as_loaded_exl2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An EXL2 layer's tensors as exllamav2 holds them after loading."""
    table = tensors["q_groups"].view(torch.uint16).tolist()
    ends = [*table[3::2], len(tensors["q_weight"])]
    parts = [
        shuffle(tensors["q_weight"][first:end], bits)
        for bits, first, end in zip(table[0::2], table[1::2], ends, strict=True)
    ]
    order = tensors["q_invperm"].long()
    return {
        **tensors,
        "q_weight": torch.cat(parts),
        "q_scale_max": (tensors["q_scale_max"].float() / 256).half(),
        "q_perm": torch.argsort(order).to(torch.int16),
    }


def as_loaded_gptq(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GPTQ layer's tensors, of a file with the zero point less 1, as exllamav2 holds them after loading."""
    loaded = dict(tensors)
    words = tensors["qweight"]
    if "g_idx" in tensors and bool((tensors["g_idx"] != 0).any()):
        perm = torch.argsort(tensors["g_idx"].long(), stable=True)
        codes = torch.stack([words >> (4 * i) & 15 for i in range(8)], 1).view(-1, words.shape[1])[perm]
        lanes = codes.view(-1, 8, words.shape[1]).to(torch.int64)
        packed = sum(lanes[:, i] << (4 * i) for i in range(8))
        words = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
        loaded["q_perm"] = perm.to(torch.int16)
    loaded["qweight"] = shuffle(words, 4)
    return loaded
