"""The errors a user can meet: one line that says what is wrong, one that says the next step, and an exit code."""

from __future__ import annotations

from enum import IntEnum


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
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class ExlError(Exception):
    """Base of everything that is the user's to mend rather than a bug of ours.

    Args:
        message: one sentence, lower case, without a final stop: what is wrong, with the numbers or names involved.
        hint: the next step, an imperative or a command; empty when there is none.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


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


class OutOfMemoryError(ExlError):
    """Too little GPU or host memory for the model and its KV cache."""

    exit_code = ExitCode.OUT_OF_MEMORY


class EngineError(ExlError):
    """An engine that is not installed, cannot start or failed while running."""

    exit_code = ExitCode.ENGINE


class DownloadError(ExlError):
    """A model that cannot be had from the Hub: not there, not allowed, not reachable, or not what it should be."""

    exit_code = ExitCode.DOWNLOAD


class DiskError(ExlError):
    """A disk that is full, or a place that cannot be read or written."""

    exit_code = ExitCode.DISK
