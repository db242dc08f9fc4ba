"""From what the user typed to the text that is tokenized: plain templates with variables, chat templates, raw text."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Literal

from exl_cli.errors import PromptError, UsageError, param
from exl_cli.models.chat_template import ChatTemplate

_RAW, _SYSTEM, _TEMPLATE, _VAR = (param(name) for name in ("raw", "system", "template", "var"))
_AS_NAME_VALUE = f"write it as {_VAR} name=value"


@dataclass(frozen=True)
class Prompt:
    """A text ready to be tokenized.

    Args:
        text: all of it.
        add_special_tokens: whether the tokenizer is to add its own, such as BOS; a chat template writes them itself.
        variables: what a plain template was filled with.
        kind: where the text came from.
    """

    text: str
    add_special_tokens: bool
    variables: dict[str, str] = field(default_factory=dict)
    kind: Literal["chat", "raw", "template"] = "raw"


def parse_variables(items: Sequence[str]) -> dict[str, str]:
    """Read variables for a plain template.

    Args:
        items: each `name=value`; the value may hold more equals signs.

    Raises:
        UsageError: an item without an equals sign or name, a name that cannot stand in a template, or one given twice.
    """
    variables: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{_VAR} {item!r} has no '='", _AS_NAME_VALUE)
        if not name.isidentifier():
            what = f"{name!r} is not a name" if name else "has no name before '='"
            raise UsageError(f"{_VAR} {item!r}: {what}", _AS_NAME_VALUE)
        if name in variables:
            raise UsageError(f"{_VAR} {name} is given twice", "give each variable once")
        variables[name] = value
    return variables


def fill(template: str, variables: Mapping[str, str]) -> str:
    """Put values into a template's `{name}` placeholders; `{{` and `}}` stand for braces.

    Args:
        template: the text with placeholders.
        variables: a value for each placeholder, and for nothing else.

    Raises:
        PromptError: the template is malformed, or its placeholders and the variables do not match.
    """
    parts, names = _parse(template), placeholders(template)
    missing = [name for name in names if name not in variables]
    unused = [name for name in variables if name not in names]
    if missing:
        raise PromptError(
            f"the template needs {{{missing[0]}}}, and no {_VAR} gives it",
            _suggest(missing[0], unused, "did you mean {} in the template?") or f"add {_VAR} {missing[0]}=…",
        )
    if unused:
        raise PromptError(
            f"{_VAR} {unused[0]} is not in the template",
            _suggest(unused[0], names, f"did you mean {_VAR} {{}}?")
            or f"drop it, or write {{{unused[0]}}} in the template",
        )
    return "".join(literal + ("" if name is None else variables[name]) for literal, name in parts)


def placeholders(template: str) -> list[str]:
    """The names that a template needs, each once.

    Raises:
        PromptError: it is malformed.
    """
    return list(dict.fromkeys(name for _, name in _parse(template) if name is not None))


def _suggest(name: str, others: Iterable[str], sentence: str) -> str:
    near = difflib.get_close_matches(name, list(others), 1)
    return sentence.format(near[0]) if near else ""


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pieces: a literal, and the placeholder after it."""
    braces = "write {{ and }} for braces that are not placeholders"
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise PromptError(f"the template has a brace that does not match: {error}", braces) from None
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if name == "" or name.isdecimal():
            raise PromptError(f"the template has a placeholder without a name: {{{name}}}", "name it, as in {question}")
        if not name.split(".")[0].split("[")[0].isidentifier():
            raise PromptError(f"the template has a placeholder that is not a name: {{{name}}}", braces)
        if not name.isidentifier() or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise PromptError(
                f"the template has a placeholder that is more than a name: {{{shown}}}",
                "use plain {name} placeholders; attributes, indices, conversions and formats are not supported",
            )
    return [(literal, name) for literal, name, _, _ in fields]


def check_text(*arguments: tuple[str, str | Sequence[str] | None]) -> None:
    """Refuse text that is not UTF-8: a bad byte of a command line arrives as a lone surrogate.

    Args:
        arguments: each a name and its value, or values; None where it was not given.

    Raises:
        PromptError: for the first that is not.
    """
    for name, values in arguments:
        for value in (values,) if isinstance(values, str) else values or ():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                position = len(value[: error.start].encode("utf-8"))
                raise not_utf8(name, position, ord(value[error.start]) & 0xFF) from error


def half_character(text: str) -> str:
    """A text's first lone surrogate, which neither files nor tokenizers take, as U+D800; empty where it has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return ""


def not_utf8(source: str, position: int, byte: int, hint: str = "convert it with iconv -t UTF-8") -> PromptError:
    """The error for bytes that are not UTF-8, which names the first bad byte and its position."""
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
    """Turn what the user gave into the text for the model.

    Args:
        text: the prompt; with a `template` it may be None, or fill the template's `{prompt}`.
        system: a system message, for models with a chat template.
        raw: send the text as it is, without the model's chat template.
        template: a plain template, sent as it is once filled.
        variables: the values for `template`.
        chat: the model's chat template; None where the model has none, and then the text is sent as it is.
        as_text: hides special tokens in what goes into a template; see `Tokenizer.as_text`.

    Raises:
        UsageError: options that do not go together.
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
        raise UsageError(f"{_RAW} and {_TEMPLATE} do not go together", f"a template is sent as it is; drop {_RAW}")
    if variables and template is None:
        raise UsageError(f"{_VAR} needs a {_TEMPLATE} to fill", f"add {_TEMPLATE} 'text with {{name}}'")
    if system is None:
        return
    if template is not None:
        raise UsageError(f"{_SYSTEM} and {_TEMPLATE} do not go together", "write the system text into the template")
    if raw:
        raise UsageError(f"{_SYSTEM} and {_RAW} do not go together", "drop one of them")
    if chat is None:
        raise UsageError(
            f"{_SYSTEM} needs a model with a chat template, and this one has none", "write it into the prompt"
        )


def _template_variables(text: str | None, template: str, variables: dict[str, str]) -> dict[str, str]:
    if text is None:
        return variables
    if "prompt" in variables or all(name != "prompt" for _, name in _parse(template)):
        raise UsageError(
            f"both a prompt and a filled {_TEMPLATE} are given",
            "drop one, or write {prompt} in the template where the prompt belongs",
        )
    return {**variables, "prompt": text}


def _not_empty(text: str | None) -> str:
    if text is None or not text.strip():
        raise PromptError("the prompt is empty", "give it with -p, as a file, or on standard input")
    return text
