"""Exceptions shown to users. Each carries a message, a hint for the next step, and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum

# Marks a parameter name inside a message. U+FDD0 and U+FDD1 are Unicode noncharacters, so no real text contains them.
_MARK = re.compile("\ufdd0([a-z_]+)\ufdd1")


def param(name: str) -> str:
    """Mark a parameter name in a message. The CLI prints it as `--max-seq-len`, Python as `max_seq_len`."""
    return f"\ufdd0{name}\ufdd1"


def spell(text: str, spelling: Callable[[str], str] = str) -> str:
    """Replace each `param` mark in a text with `spelling(name)`; by default the bare name."""
    return _MARK.sub(lambda match: spelling(match[1]), text)


def first_param(text: str) -> str:
    """The name in a text's first `param` mark, or an empty string."""
    match = _MARK.search(text)
    return match[1] if match else ""


def brief(text: str, length: int = 160) -> str:
    """Shorten user input or file contents for a message by cutting out the middle."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 4 :]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str], sentence: str = "did you mean {}?", cutoff: float = 0.6) -> str:
    """A question about the known name most like `name`; empty where none is like it."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff)
    return sentence.format(near[0]) if near else ""


class ExitCode(IntEnum):
    """Exit codes of `exl`, documented in docs/errors.md. They are stable: never renumber or reuse one."""

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
    """Base class of errors the user can fix. Any other exception is a bug.

    Args:
        message: what is wrong, with the numbers or names involved; lower case, no final period.
        hint: the next step, as an imperative or a command; may be empty.

    Both may contain `param` marks: `str()` writes the bare names, the CLI writes flags.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def marked(self) -> str:
        """Message and hint, with their `param` marks."""
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __str__(self) -> str:
        return spell(self.marked)


class UsageError(ExlError):
    """An invalid flag or argument, or a combination that cannot work."""

    exit_code = ExitCode.USAGE


class ModelNotFoundError(ExlError):
    """No model has this name or path, or it is only partly downloaded."""

    exit_code = ExitCode.MODEL_NOT_FOUND


class UnsupportedModelError(ExlError):
    """The model is intact, but exl or the chosen engine cannot run it."""

    exit_code = ExitCode.UNSUPPORTED_MODEL


class DamagedModelError(ExlError):
    """Model files are missing, truncated or unreadable."""

    exit_code = ExitCode.DAMAGED_MODEL


class PromptError(ExlError):
    """The prompt or chat template cannot be turned into tokens, or the prompt does not fit the context."""

    exit_code = ExitCode.PROMPT


class ContextLengthError(PromptError):
    """The prompt does not fit the context."""


class OutOfMemoryError(ExlError):
    """Not enough GPU or host memory for the model and its KV cache."""

    exit_code = ExitCode.OUT_OF_MEMORY


class EngineError(ExlError):
    """The engine is not installed, cannot start, or failed while running."""

    exit_code = ExitCode.ENGINE


class DeviceError(EngineError):
    """A CUDA error that leaves this process unable to use the GPU."""


class ResponseTimeoutError(EngineError, TimeoutError):
    """The response was not complete before the timeout."""


class DownloadError(ExlError):
    """A download failed: repository missing, access denied, Hub unreachable, or a file that does not match its hash."""

    exit_code = ExitCode.DOWNLOAD


class DiskError(ExlError):
    """The disk is full, or a path cannot be read or written."""

    exit_code = ExitCode.DISK


@contextlib.contextmanager
def os_errors(problem: str, hint: str, kind: type[ExlError] = DiskError) -> Iterator[None]:
    """Turn an OSError into an ExlError: the problem, the system's reason, the hint."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem}: {error.strerror or error}", hint) from error
