"""The errors a user can meet: one line that says what is wrong, one that says the next step, and an exit code."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import IntEnum

# A parameter's name inside a message, between two code points that no text of ours or of a model uses.
_MARK = re.compile("\ufdd0([a-z_]+)\ufdd1")


def param(name: str) -> str:
    """A parameter, for use in the text of an error or a note: the CLI shows `--max-seq-len`, Python `max_seq_len`."""
    return f"\ufdd0{name}\ufdd1"


def spell(text: str, spelling: Callable[[str], str] = str) -> str:
    """Text with each `param` in it written out, by its name unless `spelling` says otherwise."""
    return _MARK.sub(lambda match: spelling(match[1]), text)


def brief(text: str, length: int = 160) -> str:
    """A name for a message: a stranger's can have thousands of characters. Its middle is left out."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 4 :]}"


class ExitCode(IntEnum):
    """What `exl` returns to the shell. README lists these; a number never changes its meaning."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    MODEL_NOT_FOUND = 3
    UNSUPPORTED_MODEL = 4
    DAMAGED_MODEL = 5
    PROMPT = 6
    OUT_OF_MEMORY = 7
    ENGINE = 8
    DOWNLOAD = 9
    DISK = 10
    BENCH_SLOWER = 11
    CPU_ONLY = 12
    CANNOT_RUN = 13
    LINES_FAILED = 14
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class ExlError(Exception):
    """Base of everything that is the user's to mend rather than a bug of ours.

    Args:
        message: one sentence, lower case, without a final stop: what is wrong, with the numbers or names involved.
        hint: the next step, an imperative or a command; empty when there is none.

    Both may hold a `param`. `str()` writes parameters by name; the CLI shows an error through `spell`.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return spell(f"{self.message}; {self.hint}" if self.hint else self.message)


class UsageError(ExlError):
    """A flag or argument that cannot be honoured."""

    exit_code = ExitCode.USAGE


class ModelNotFoundError(ExlError):
    """No model of that name or path is here."""

    exit_code = ExitCode.MODEL_NOT_FOUND


class UnsupportedModelError(ExlError):
    """A model that is whole, but of a kind that exl or the chosen engine cannot run."""

    exit_code = ExitCode.UNSUPPORTED_MODEL


class DamagedModelError(ExlError):
    """A model folder whose files are missing, truncated or unreadable."""

    exit_code = ExitCode.DAMAGED_MODEL


class PromptError(ExlError):
    """A prompt or template that cannot be turned into tokens, or does not fit the context."""

    exit_code = ExitCode.PROMPT


class ContextLengthError(PromptError):
    """A prompt that is longer than the context."""


class OutOfMemoryError(ExlError):
    """Too little GPU or host memory for the model and its KV cache."""

    exit_code = ExitCode.OUT_OF_MEMORY


class EngineError(ExlError):
    """An engine that is not installed, cannot start or failed while running."""

    exit_code = ExitCode.ENGINE


class DeviceError(EngineError):
    """A fault after which this process cannot use the GPU any more."""


class ResponseTimeoutError(EngineError, TimeoutError):
    """A response that was not complete within the time given."""


class DownloadError(ExlError):
    """A model that cannot be had from the Hub: not there, not allowed, not reachable, or not what it should be."""

    exit_code = ExitCode.DOWNLOAD


class DiskError(ExlError):
    """A disk that is full, or a place that cannot be read or written."""

    exit_code = ExitCode.DISK
