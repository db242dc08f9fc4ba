"""Perplexity of a text: the quality beside the speed.

A window slides over the text by half its length; of each window only the tokens that no earlier window has predicted
count, so that each (but those of the first window) is predicted from at least half a window of context. This is the
strided evaluation of transformers' documentation ("Perplexity of fixed-length models").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench.result import Perplexity, deviation, mean
from exl_cli.errors import PromptError, brief, param
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.files import expanded, read_file

WINDOW = 1024
# Few enough rows for the kernels that generation uses, and whole blocks of a quantized cache.
STEP = 8


def read(file: Path) -> tuple[str, str]:
    """A text and the SHA-256 of its file.

    Raises:
        PromptError: it cannot be read, or is not UTF-8.
    """
    try:
        data = read_file(expanded(file), pipes=True)
        return data.decode("utf-8-sig"), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise PromptError(
            f"cannot read {brief(str(file))}: {error.strerror or error}", f"check {param('perplexity')}"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8 text: byte {error.start}", "convert it with iconv -t UTF-8") from error


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """First token, end and count of tokens to predict of each window over a text of so many tokens."""
    predicted = 1  # nothing comes before the first token
    begin = 0
    while predicted < length:
        end = min(begin + window, length)
        yield begin, end, end - predicted
        predicted = end
        begin += stride


def perplexity(
    engine: EngineThread, tokenizer: Tokenizer, file: Path, progress: Callable[[int, int], None]
) -> Perplexity:
    """Evaluate a text.

    Args:
        engine: a loaded model.
        tokenizer: its tokenizer.
        file: the text.
        progress: called with (tokens predicted, tokens in all).

    Raises:
        PromptError: the file cannot be read or has fewer than two tokens.
    """
    from exl_cli.engines.scoring import log_likelihoods

    text, digest = read(file)
    ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=True)
    if len(ids) < 2:
        raise PromptError(f"{file} has {len(ids)} tokens", "perplexity needs two at least")
    window = min(WINDOW, engine.context_length)
    stride = max(window // 2, 1)
    step = STEP if engine.has_cached_scoring else 0
    losses: list[float] = []
    for begin, end, count in windows(len(ids), window, stride):
        losses += [-value for value in log_likelihoods(engine, ids[begin:end], count, STEP)]
        progress(len(losses), len(ids) - 1)
    error = deviation(losses) / len(losses) ** 0.5
    return Perplexity(str(file), digest, len(losses), window, stride, step, mean(losses), error)
