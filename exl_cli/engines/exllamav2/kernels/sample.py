"""The arguments of `sample.cu`: from logits to tokens."""

from __future__ import annotations

import ctypes

from exl_cli.sampling import Sampling

FILE, NAME = "sample.cu", "sample"
THREADS = 1024
SHARED_BYTES = 9216
FAILED = -1
MOST_TOP = 64
MOST_PARTS = 16
# Bytes of `Meeting`: counters, maxima, sums and histograms.
MEETING_BYTES = 16 + 2 * MOST_PARTS * (8 + 16) + 3 * 2048 * 4

# Flags of `Row`.
_GREEDY, _LAST, _MIROSTAT, _FADING = 1, 2, 4, 8
_UNLIMITED = 2**32 - 1
# Columns of a block that make up for meeting the others.
_LEAST_COLUMNS = 4096


class Row(ctypes.Structure):
    """`Row` of sample.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("history", "next", "mask", "breakers", "is_protected", "edited")),
        ("biases", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("logits", "length", "edits", "flags", "top_k")),
        *((name, ctypes.c_uint32) for name in ("repetition_range", "repetition_decay")),
        *((name, ctypes.c_uint32) for name in ("dry_allowed_length", "dry_range", "dry_max_ngram", "top_logprobs")),
        *((name, ctypes.c_float) for name in ("temperature", "smoothing", "top_p", "top_a", "min_p", "typical")),
        *((name, ctypes.c_float) for name in ("min_temp", "max_temp", "temp_exponent")),
        *((name, ctypes.c_float) for name in ("repetition", "presence", "frequency", "dry_multiplier", "dry_base")),
        *((name, ctypes.c_float) for name in ("xtc_probability", "xtc_threshold", "bits")),
    )


class Chosen(ctypes.Structure):
    """`Chosen` of sample.cu."""

    _fields_ = (
        ("token", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("prob", "total", "logit")),
        ("top", ctypes.c_uint32),
        ("padding", ctypes.c_uint32 * 3),
        ("ids", ctypes.c_int32 * MOST_TOP),
        ("logits", ctypes.c_float * MOST_TOP),
    )


class SampleArgument(ctypes.Structure):
    """`Sample` of sample.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows", "chosen", "meetings", "scratch")),
        ("columns", ctypes.c_uint32),
        ("vocab", ctypes.c_uint32),
    )


def parts(rows: int, columns: int, processors: int) -> int:
    """Blocks per row: as many as run at once on a GPU of so many multiprocessors, and have enough to do."""
    return max(1, min(MOST_PARTS, processors // rows, columns // _LEAST_COLUMNS))


def why_not(settings: Sampling) -> str:
    """Why settings are left to the CPU's sampler, in a few words; empty if the kernel supports them.

    Tail-free sampling and skew need sorted candidates.
    """
    if 0 < settings.tfs < 1:
        return "tail-free sampling"
    return "skew" if settings.skew else ""


def row(settings: Sampling, seed: int) -> Row:
    """Make a request's `Row`, except for pointers and what changes from token to token."""
    s = settings
    fading = s.token_repetition_decay > 0 or s.token_frequency_penalty != 0
    flags = _GREEDY * s.greedy | _LAST * s.temperature_last | _MIROSTAT * s.mirostat | _FADING * fading
    return Row(
        seed=seed % 2**64,
        flags=flags,
        top_k=min(s.top_k, _UNLIMITED),
        repetition_range=_UNLIMITED if s.token_repetition_range < 0 else min(s.token_repetition_range, _UNLIMITED),
        repetition_decay=min(s.token_repetition_decay, _UNLIMITED),
        dry_allowed_length=min(s.dry_allowed_length, _UNLIMITED),
        dry_range=min(s.dry_range, _UNLIMITED),
        dry_max_ngram=min(s.dry_max_ngram, _UNLIMITED),
        temperature=s.temperature,
        smoothing=s.smoothing_factor,
        top_p=s.top_p,
        top_a=s.top_a,
        min_p=s.min_p,
        typical=s.typical,
        min_temp=s.min_temp,
        max_temp=s.max_temp,
        temp_exponent=s.temp_exponent,
        repetition=s.token_repetition_penalty,
        presence=s.token_presence_penalty,
        frequency=s.token_frequency_penalty,
        dry_multiplier=s.dry_multiplier,
        dry_base=s.dry_base,
        xtc_probability=s.xtc_probability,
        xtc_threshold=s.xtc_threshold,
        bits=2.0 * s.mirostat_tau,
    )
