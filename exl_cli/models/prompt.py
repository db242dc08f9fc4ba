"""Render the user's input into the text to tokenize: chat template, plain template with variables, or raw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Literal

from exl_cli.errors import PromptError, UsageError, brief, did_you_mean, os_errors, param
from exl_cli.models.chat_template import ChatTemplate
from exl_cli.system.files import expanded, read_file

_RAW, _SYSTEM, _TEMPLATE, _VAR = (param(name) for name in ("raw", "system", "template", "var"))
_CONVERT = "convert it with iconv -t UTF-8"
_AS_NAME_VALUE = f"write it as {_VAR} name=value"


@dataclass(frozen=True)
class Prompt:
    """Text ready to be tokenized.

    Args:
        text: the full prompt.
        add_special_tokens: whether the tokenizer adds BOS and the like; chat templates write them themselves.
        variables: the values that filled a plain template.
        kind: how the text was made.
    """

    text: str
    add_special_tokens: bool
    variables: dict[str, str] = field(default_factory=dict)
    kind: Literal["chat", "raw", "template"] = "raw"


def parse_variables(items: Sequence[str]) -> dict[str, str]:
    """Parse `name=value` items; values may contain further equals signs.

    Raises:
        UsageError: no equals sign, a name that is not an identifier, or a repeated name.
    """
    variables: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{_VAR} {item!r} has no '='", _AS_NAME_VALUE)
        if not name.isidentifier():
            what = f"{name!r} is not a valid name" if name else "no name before '='"
            raise UsageError(f"{_VAR} {item!r}: {what}", _AS_NAME_VALUE)
        if name in variables:
            raise UsageError(f"{_VAR} {name} is given twice", "give each variable once")
        variables[name] = value
    return variables


def fill(template: str, variables: Mapping[str, str]) -> str:
    """Replace `{name}` placeholders; `{{` and `}}` are literal braces.

    Raises:
        PromptError: the template is malformed, or placeholders and variables do not match exactly.
    """
    parts, names = _parse(template), placeholders(template)
    missing = [name for name in names if name not in variables]
    unused = [name for name in variables if name not in names]
    if missing:
        raise PromptError(
            f"the template needs {{{missing[0]}}}, but no {_VAR} sets it",
            did_you_mean(missing[0], unused, "did you mean {} in the template?") or f"add {_VAR} {missing[0]}=…",
        )
    if unused:
        raise PromptError(
            f"{_VAR} {unused[0]} is not in the template",
            did_you_mean(unused[0], names, f"did you mean {_VAR} {{}}?")
            or f"drop it, or use {{{unused[0]}}} in the template",
        )
    return "".join(literal + ("" if name is None else variables[name]) for literal, name in parts)


def placeholders(template: str) -> list[str]:
    """The distinct placeholder names of a template, in order.

    Raises:
        PromptError: the template is malformed.
    """
    return list(dict.fromkeys(name for _, name in _parse(template) if name is not None))


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal, name of the placeholder after it or None)."""
    braces = "write {{ and }} for literal braces"
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise PromptError(f"unmatched brace in the template: {error}", braces) from None
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if name == "" or name.isdecimal():
            raise PromptError(f"placeholder without a name in the template: {{{name}}}", "name it, e.g. {question}")
        if not name.split(".")[0].split("[")[0].isidentifier():
            raise PromptError(f"invalid placeholder in the template: {{{name}}}", braces)
        if not name.isidentifier() or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise PromptError(
                f"unsupported placeholder in the template: {{{shown}}}",
                "only plain {name} placeholders are supported",
            )
    return [(literal, name) for literal, name, _, _ in fields]


def check_text(*arguments: tuple[str, str | Sequence[str] | None]) -> None:
    """Check that command-line text is UTF-8. Python decodes argv with surrogateescape: bad bytes are lone surrogates.

    Args:
        arguments: pairs of a name and its value or values; None if not given.

    Raises:
        PromptError: for the first bad byte.
    """
    for name, values in arguments:
        for value in (values,) if isinstance(values, str) else values or ():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                position = len(value[: error.start].encode("utf-8"))
                raise _not_utf8(name, position, ord(value[error.start]) & 0xFF, _CONVERT) from error


def half_character(text: str) -> str:
    """The first lone surrogate in a text, as "U+D800"; empty if there is none. Tokenizers and files reject them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return ""


def read_input(file: Path, hint: str) -> bytes:
    """Read a file or pipe that the user names, or raise a DiskError with this hint."""
    with os_errors(f"cannot read {brief(str(file))}", hint):
        return read_file(expanded(file), pipes=True)


def decode(data: bytes, source: str, hint: str = _CONVERT, encoding: str = "utf-8-sig") -> str:
    """Decode UTF-8, or raise a PromptError that names the source and its first bad byte."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_utf8(source, error.start, data[error.start], hint) from error


def _not_utf8(source: str, position: int, byte: int, hint: str) -> PromptError:
    return PromptError(f"{source} is not UTF-8 text: byte {position} is 0x{byte:02x}", hint)


def render_prompt(
    text: str | None,
    *,
    system: str | None = None,
    raw: bool = False,
    template: str | None = None,
    variables: Mapping[str, str] | None = None,
    chat: ChatTemplate | None = None,
    as_text: Callable[[str], str] = str,
) -> Prompt:
    """Render a prompt for the model.

    Args:
        text: the prompt. With `template`, it fills `{prompt}` or is None.
        system: a system message; needs a chat template.
        raw: bypass the chat template.
        template: a plain template; its filled text bypasses the chat template.
        variables: values for `template`.
        chat: the model's chat template; if None, the text is sent as it is.
        as_text: escapes special tokens in user text; see `Tokenizer.as_text`.

    Raises:
        UsageError: options that exclude each other.
        PromptError: an empty prompt, or a template that cannot be filled or rendered.
    """
    _check_options(system=system, raw=raw, template=template, variables=variables, chat=chat)
    if template is not None:
        values = _template_variables(text, template, dict(variables or {}))
        return Prompt(
            _not_empty(fill(template, {name: as_text(value) for name, value in values.items()})),
            add_special_tokens=True,
            variables=values,
            kind="template",
        )
    text = _not_empty(text)
    if raw or chat is None:
        return Prompt(text, add_special_tokens=True, kind="raw")
    messages = [{"role": "user", "content": as_text(text)}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": as_text(system)})
    return Prompt(chat.render(messages), add_special_tokens=False, kind="chat")


def _check_options(
    *,
    system: str | None,
    raw: bool,
    template: str | None,
    variables: Mapping[str, str] | None,
    chat: ChatTemplate | None,
) -> None:
    if raw and template is not None:
        raise UsageError(
            f"{_RAW} cannot be combined with {_TEMPLATE}", f"drop {_RAW}, since templates are sent as they are"
        )
    if variables and template is None:
        raise UsageError(f"{_VAR} needs a {_TEMPLATE} to fill", f"add {_TEMPLATE} 'text with {{name}}'")
    if system is None:
        return
    if template is not None:
        raise UsageError(f"{_SYSTEM} cannot be combined with {_TEMPLATE}", "put the system message into the template")
    if raw:
        raise UsageError(f"{_SYSTEM} cannot be combined with {_RAW}", "drop one of them")
    if chat is None:
        raise UsageError(
            f"{_SYSTEM} needs a model with a chat template, but this one has none", "put it into the prompt"
        )


def _template_variables(text: str | None, template: str, variables: dict[str, str]) -> dict[str, str]:
    if text is None:
        return variables
    if "prompt" in variables or all(name != "prompt" for _, name in _parse(template)):
        raise UsageError(
            f"the {_TEMPLATE} has no place for the prompt",
            "drop the prompt, or add {prompt} to the template",
        )
    return {**variables, "prompt": text}


def _not_empty(text: str | None) -> str:
    if text is None or not text.strip():
        raise PromptError("the prompt is empty", f"pass it with {param('prompt')}, {param('file')} or standard input")
    return text
