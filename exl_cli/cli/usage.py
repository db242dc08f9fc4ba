"""Turn Typer's usage errors into one line in exl's own words."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

import typer

from exl_cli.errors import UsageError, did_you_mean

# Typer's own class, which has moved between its versions.
RawUsageError: type[Exception] = typer.BadParameter.__mro__[1]

_KINDS = {"integer": "a whole number", "number": "a number", "float": "a number", "boolean": "1 or 0"}
_INVALID = re.compile(r"Input should be a valid (\w+)|.* is not a valid (\w+)", re.DOTALL)
_CHOICE = re.compile(r"(?:Value error, )?(?P<got>'.*') is not one of (?P<all>.*?)\.?", re.DOTALL)


def unknown_command(name: str, commands: Sequence[str]) -> UsageError:
    """The error for an unknown command."""
    shown = textwrap.shorten(name, 60, placeholder="…")
    if name != name.strip() or " " in name.strip() or "\n" in name:
        return UsageError(f"unknown command {shown!r}", f"to run a prompt, use exl run -p {shlex.quote(shown)}")
    near = did_you_mean(name, commands, "did you mean exl {}? ")
    return UsageError(f"unknown command {shown!r}", f"{near}see exl --help")


def explain(error: Exception, command: str | None) -> UsageError:
    """The error for anything else that Typer rejects.

    Args:
        error: a `RawUsageError`.
        command: the command it belongs to; None for exl itself.
    """
    see = f"see exl {command} --help" if command else "see exl --help"
    raw: Any = error
    if getattr(raw, "param", None) is not None:
        return _parameter(raw, see)
    option, possible = getattr(raw, "option_name", ""), getattr(raw, "possibilities", None)
    if option and (possible is not None or "No such option" in raw.message):
        near = f"did you mean {_either(list(possible))}? " if possible else ""
        return UsageError(f"unknown option {option}", near + see)
    if option:
        wrong = "takes no value" if "not take" in raw.message else "needs a value"
        return UsageError(f"{option} {wrong}", see)
    extra = re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", raw.message, re.DOTALL)
    if extra:
        return UsageError(
            f"too many arguments: {textwrap.shorten(extra[1], 60, placeholder='…')}",
            f"quote text that contains spaces; {see}",
        )
    return UsageError(_plain(raw.format_message()), see)


def _parameter(error: Any, see: str) -> UsageError:
    """The error for the value of an option, argument or environment variable."""
    param = error.param
    name = (param.metavar or param.name.upper()) if param.param_type_name == "argument" else max(param.opts, key=len)
    if type(error).__name__ == "MissingParameter":
        return UsageError(f"{name} is required", see)
    source = error.ctx.get_parameter_source(param.name) if error.ctx is not None else None
    if getattr(source, "name", "") == "ENVIRONMENT":
        name = param.envvar if isinstance(param.envvar, str) else param.envvar[0]
    choice = _CHOICE.fullmatch(error.message)
    if choice:
        choices = [word.strip().strip("'") for word in choice["all"].split(",")]
        return UsageError(f"{name} must be {_either(choices)}, got {choice['got']}", see)
    kind, limits = _kind(param, error.message), _limits(param)
    if not kind and not limits:
        return UsageError(f"{name}: {_plain(error.message)}", see)
    return UsageError(f"{name} must be {', '.join(filter(None, (kind, limits)))}{_got(error)}", see)


def _kind(param: Any, message: str) -> str:
    match = _INVALID.match(message)
    return _KINDS.get(match[1] or match[2], "") if match else ""


def _limits(param: Any) -> str:
    """The parameter's declared range, which older versions of Typer keep in its type."""
    low, high = (getattr(param, side, None) for side in ("min", "max"))
    if low is None and high is None:
        low, high = (getattr(getattr(param, "type", None), side, None) for side in ("min", "max"))
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""


def _got(error: Any) -> str:
    """The rejected value, if the error contains it."""
    details = getattr(error.__cause__, "errors", None)
    if details is not None:
        return f", got {str(details()[0]['input'])!r}"
    quoted = re.match(r"'?(.*?)'? is not ", error.message)
    return f", got {quoted[1]!r}" if quoted else ""


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _plain(text: str) -> str:
    """Rewrite a message in one line, in lower case."""
    line = " ".join(text.split()).removesuffix(".").removeprefix("Value error, ")
    return line[:1].lower() + line[1:]
