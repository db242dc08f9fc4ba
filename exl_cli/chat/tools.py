"""What the chat uses of the machine around it: files, the user's editor, the clipboard."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from exl_cli.errors import PromptError, UsageError

_EDITORS = ("nano", "vim", "vi")
_CLIPBOARDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
    ("", ("clip.exe",)),
)


@dataclass(frozen=True)
class Attachment:
    """A file that goes with a message.

    Attributes:
        name: its name, as the model is told it.
        text: its content.
    """

    name: str
    text: str

    def __str__(self) -> str:
        """As it stands in the message: fenced by more backticks than it has itself."""
        longest = max((len(run) for run in re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        end = "" if self.text.endswith("\n") else "\n"
        return f"{self.name}:\n\n{fence}\n{self.text}{end}{fence}"


def read_attachment(path: str) -> Attachment:
    """A file to put into a message.

    Raises:
        PromptError: it cannot be read, or is not text.
    """
    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read {file}: {error.strerror or error}", "check the path") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{file} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        raise PromptError(what, "only text can go into a message") from error
    if "\0" in text:
        raise PromptError(f"{file} is not a text file: it has zero bytes", "only text can go into a message")
    return Attachment(file.name, text)


def with_attachments(attachments: list[Attachment], text: str) -> str:
    """A message with its files, these first."""
    return "\n\n".join([*map(str, attachments), text])


def _editor() -> list[str]:
    for variable in ("VISUAL", "EDITOR"):
        if command := os.environ.get(variable, "").strip():
            return shlex.split(command)
    found = next((editor for editor in _EDITORS if shutil.which(editor)), None)
    if found is None:
        raise UsageError("there is no editor", "set $VISUAL or $EDITOR to yours")
    return [found]


def edit(text: str) -> str:
    """Let the user edit a text in `$VISUAL`, else `$EDITOR`, else an editor that is there.

    Returns:
        The text as it was left; one line break at its end, which editors add, is taken away.

    Raises:
        UsageError: there is no editor, or it failed.
    """
    command = _editor()
    with tempfile.TemporaryDirectory(prefix="exl-") as folder:
        file = Path(folder) / "message.md"
        file.write_text(text, encoding="utf-8")
        try:
            # It is to talk to the terminal, not to a pipe that collects answers or that the lines come from.
            stdin = None if sys.stdin.isatty() else subprocess.DEVNULL
            status = subprocess.run([*command, str(file)], stdin=stdin, stdout=2).returncode  # noqa: S603
        except OSError as error:
            raise UsageError(
                f"cannot start the editor {command[0]}: {error.strerror or error}", "set $VISUAL or $EDITOR to yours"
            ) from error
        if status:
            raise UsageError(f"the editor {command[0]} ended with status {status}", "the message is as it was")
        try:
            return file.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the editor left nothing readable: {error}", "the message is as it was") from error


def clipboard_command() -> list[str] | None:
    """A program that fills the clipboard of the screen in front of the user.

    None where there is none, and over ssh, where such a program would fill the clipboard of the far machine.
    """
    if os.environ.get("SSH_CONNECTION"):
        return None
    for variable, command in _CLIPBOARDS:
        if (not variable or os.environ.get(variable)) and shutil.which(command[0]):
            return list(command)
    return None


def fill_clipboard(command: list[str], text: str) -> None:
    """Give a text to a clipboard program.

    Raises:
        UsageError: it failed.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.run(command, input=text.encode(), check=True, timeout=10, **quiet)  # type: ignore[call-overload]  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{command[0]} failed: {error}", "/export PATH writes the conversation to a file") from error
