"""Collect the prompt from arguments, a file and standard input, and the model, downloading it if needed."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from pathlib import Path

from exl_cli import loader
from exl_cli.api.download import fetch
from exl_cli.errors import ModelNotFoundError, UsageError, os_errors
from exl_cli.models import folders
from exl_cli.models.hub import names
from exl_cli.models.hub.download import Wanted, prepare
from exl_cli.models.info import ModelInfo
from exl_cli.models.prompt import check_text, decode, read_input
from exl_cli.system import units
from exl_cli.system.files import read_stream
from exl_cli.ui.console import Console
from exl_cli.ui.models import confirm
from exl_cli.ui.progress import finished, transfers

# Seconds until a note explains that exl waits for a silent pipe.
_PATIENCE_SECONDS = 2.0


def gather(
    prompt: str | None, positional: str | None, file: Path | None, note: Callable[[str], None], *, exact: bool = False
) -> str | None:
    """Collect the prompt text.

    Text piped in beside a prompt goes in front of it, with a blank line between them. Text from a file or pipe loses
    its last line break and its byte order mark, and its line breaks become \\n.

    Args:
        prompt: `--prompt`.
        positional: the argument after MODEL; only one of `prompt`, `positional` and `file` may be given.
        file: `--file`; "-" is standard input.
        note: called if a pipe stays silent.
        exact: take a single source byte for byte.

    Returns:
        None where there is no text at all: no flag, and nothing piped in.

    Raises:
        UsageError: two sources at once.
        DiskError: a file that cannot be read.
        PromptError: text that is not UTF-8, arguments included.
    """
    check_text(("--prompt", prompt), ("PROMPT", positional))
    given = [
        name for name, value in (("--prompt", prompt), ("PROMPT", positional), ("--file", file)) if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be combined", "give the prompt once")
    if file is not None and str(file) == "-":
        return _read_stdin(exact)
    text = prompt if prompt is not None else positional
    if file is not None:
        text = _text(read_input(file, "check the path in --file"), str(file), exact)
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return text
    if text is not None:
        _explain_silence(note)
    piped = _read_stdin(exact and text is None)
    if not piped:
        return text
    return piped if text is None else f"{piped}\n\n{text}"


def _explain_silence(note: Callable[[str], None]) -> None:
    try:
        ready, _, _ = select.select([sys.stdin], [], [], _PATIENCE_SECONDS)
    except (OSError, ValueError):  # a test's or an embedder's stand-in without a file descriptor
        return
    if not ready:
        note("waiting for more of the prompt on standard input; add </dev/null if there is none")


def _read_stdin(exact: bool) -> str:
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:
        return sys.stdin.read()
    with os_errors("cannot read standard input", "give a shorter prompt"):
        data = read_stream(buffer)
    return _text(data, "standard input", exact)


def _text(data: bytes, source: str, exact: bool) -> str:
    if exact:
        return decode(data, source, encoding="utf-8")
    return decode(data, source).replace("\r\n", "\n").removesuffix("\n")


def not_a_model(error: loader.UnfamiliarNameError, name: str, hint: str) -> ModelNotFoundError:
    """The error for a model argument that may be a prompt: a sentence gets this hint alone, a word both hints."""
    return ModelNotFoundError(error.message, hint if len(name.split()) > 1 else f"{error.hint}; {hint}")


def ensure(model: str | None, models: Path | None, *, allow: bool, console: Console) -> ModelInfo:
    """Resolve the model, downloading it first if needed.

    Args:
        model, models: see `loader.resolve`.
        allow: download without asking; else a person at a terminal is asked, and nothing is fetched for anyone else.
        console: where to ask and to show progress.

    Raises:
        ModelNotFoundError: it is not here, and no one said yes.
        ExlError: see `fetch`.
    """
    try:
        return loader.resolve(model, models)
    except ModelNotFoundError:
        repository = names.parse(model or "")
        if repository is None or not (allow or (sys.stdin.isatty() and console.err.is_terminal)):
            raise
        wanted = Wanted(repository, folders.models_dir(models))
        plan = None
        if not allow:
            from exl_cli.models.hub.client import Hub

            plan = prepare(Hub(note=console.note), wanted)
            question = f"{repository} is not downloaded yet. Download {units.size(plan.remaining)} to {wanted.folder}?"
            if not confirm(console, question):
                raise
    finished(console, fetch(wanted, transfers(console), plan=plan))
    return loader.resolve(model, models)
